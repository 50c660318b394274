"""C++: the steps as functions that Python calls with its tensors. A call with nothing to compute takes 4 us, output included, where the
checked way in Python and ctypes takes 105 (one run on a busy machine).

Tensors are read through DLPack's exchange table, which torch.Tensor of torch 2.13 carries as `__dlpack_c_exchange_api__`, and of
Python itself only functions of its stable ABI are used: no header is needed. A call that is unusual in any way (sizes that do not agree, other
devices and dtypes, strided rows, subclasses) returns None, and the caller takes the checked way, which says what is wrong.
"""

SOURCE = r"""
extern "C" {
struct PyObject;
PyObject* PyCFunction_NewEx(void* method, PyObject* self, PyObject* module);
PyObject* PyObject_Type(PyObject*);
PyObject* PyErr_Occurred(void);
double PyFloat_AsDouble(PyObject*);
void PyErr_Clear(void);
void Py_IncRef(PyObject*);
void Py_DecRef(PyObject*);
void* PyEval_SaveThread(void);
void PyEval_RestoreThread(void*);
}
namespace python {
struct Method { const char* name; void* function; int flags; const char* doc; };
constexpr int FASTCALL = 0x80;

struct View { void* data; int32_t device, index; int32_t dims; uint8_t code, bits; uint16_t lanes; int64_t *shape, *strides; uint64_t offset; };
struct Managed { uint32_t major, minor; void* context; void (*deleter)(Managed*); uint64_t flags; View view; };
struct Exchange {
  uint32_t major, minor;
  void* older;
  int (*allocate)(View* like, Managed** out, void* context, void (*error)(void*, const char*, const char*));
  int (*from)(void*, Managed**);
  int (*to)(Managed*, void**);
  int (*look)(void* tensor, View* out);
};
static struct { PyObject *none, *tensor, *parameter; const Exchange* exchange; } known;

struct Call {  // sizes by letter, as in shapes.py: 0 is not settled
  int64_t size[128] = {0};
  bool ok = true;
  bool look(PyObject* x, View& v) {
    PyObject* type = PyObject_Type(x);
    Py_DecRef(type);  // the object keeps it
    if (type != known.tensor && type != known.parameter) return ok = false;
    if (known.exchange->look(x, &v)) return PyErr_Clear(), ok = false;
    int kind = v.code == 2 && v.bits == 32 ? 0 : v.code == 4 && v.bits == 16 ? 1 : v.code == 2 && v.bits == 16 ? 2 : 3;
    v.index = kind;
    return ok = ok && v.device == 1 && kind < 3 && v.lanes == 1;
  }
  void fit(const View& v, const char* letters) {
    ok = ok && v.dims == (int)strlen(letters);
    for (int i = 0; ok && i < v.dims; i++) {
      int64_t& n = size[(int)letters[i]];
      if (!n) n = v.shape[i];
      ok = v.shape[i] == n && n > 0;
    }
  }
  // Rows [B, H, K] or [B, T, H, K], or one number a head [B, H]
  Tensor rows(PyObject* x, const char* letters) {
    View v;
    if (x == known.none || !look(x, v)) return {};
    return rows(v, letters);
  }
  Tensor rows(const View& v, const char* letters) {
    fit(v, letters);
    if (!ok) return {};
    int n = v.dims;
    if (n > 2) ok = v.strides[n - 1] == 1 || v.shape[n - 1] == 1;
    return {(char*)v.data + v.offset, v.strides[0], n == 4 ? v.strides[1] : 0, v.strides[n == 4 ? 2 : 1], v.index};
  }
  Tensor decay(PyObject* x, const char* letters, int64_t& mode) {  // one number a head, or one a feature
    View v;
    if (x == known.none || !look(x, v)) return {};
    char scalar[3] = {letters[0], letters[1], 0};
    mode = v.dims == 3 ? VECTOR : SCALAR;
    return rows(v, mode == VECTOR ? letters : scalar);
  }
  float* state(PyObject* x, const char* letters) {
    View v;
    if (x == known.none || !look(x, v)) return nullptr;
    fit(v, letters);
    int64_t n = 1;
    for (int i = v.dims - 1; ok && i >= 0; n *= v.shape[i--]) ok = v.strides[i] == n || v.shape[i] == 1;
    ok = ok && v.index == 0;
    return (float*)((char*)v.data + v.offset);
  }
  double number(PyObject* x, double otherwise) {
    if (x == known.none) return otherwise;
    double y = PyFloat_AsDouble(x);
    if (y == -1.0 && PyErr_Occurred()) PyErr_Clear(), ok = false;
    return y;
  }
  PyObject* run(StepArgs& a, void (*step)(const StepArgs*)) {
    PyObject* out = nullptr;
    a.B = size['B'], a.G = size['G'], a.K = size['K'], a.V = size['V'];
    if (ok && size['H'] % a.G == 0) {
      a.R = size['H'] / a.G;
      int64_t shape[3] = {a.B, size['H'], a.V}, strides[3] = {shape[1] * shape[2], shape[2], 1};
      View like = {nullptr, 1, 0, 3, 2, 32, 1, shape, strides, 0};
      Managed* made = nullptr;
      if (!known.exchange->allocate(&like, &made, nullptr, [](void*, const char*, const char*) {})) {
        a.o = (float*)made->view.data;
        void* thread = PyEval_SaveThread();
        step(&a);
        PyEval_RestoreThread(thread);
        if (known.exchange->to(made, (void**)&out)) PyErr_Clear(), out = nullptr;
      }
    }
    if (!out) Py_IncRef(out = known.none);
    return out;
  }
};
// q, k, v, beta or None, state, log_decay or None, scale
static PyObject* linear_step(PyObject*, PyObject* const* x, int64_t count) {
  Call c;
  StepArgs a = {};
  c.ok = count == 7;
  if (c.ok) {
    a.q = c.rows(x[0], "BHK"), a.k = c.rows(x[1], "BGK"), a.v = c.rows(x[2], "BGV"), a.beta = c.rows(x[3], "BG"), a.S = c.state(x[4], "BGKV");
    a.g = c.decay(x[5], "BGK", a.mode), a.scale = c.number(x[6], 1.0);
    c.ok = c.ok && a.q.p && a.k.p && a.v.p && a.S && !(a.beta.p && a.mode == VECTOR);
  }
  return c.run(a, subquad_linear_step);
}
// q, k, v, fq, mix, state, left_fk, left_v, log_decay, scale, sink_k, sink_v; None where there is none
static PyObject* window_step(PyObject*, PyObject* const* x, int64_t count) {
  Call c;
  StepArgs a = {};
  c.ok = count == 12;
  if (c.ok) {
    a.q = c.rows(x[0], "BHK"), a.k = c.rows(x[1], "BWGK"), a.v = c.rows(x[2], "BWGV"), a.fq = c.rows(x[3], "BHF"), a.mix = c.rows(x[4], "BH");
    c.size['X'] = c.size['V'] + 1;
    a.S = c.state(x[5], "BGFX"), a.lk = c.rows(x[6], "BGF"), a.lv = c.rows(x[7], "BGV"), a.g = c.decay(x[8], "BGF", a.mode);
    a.sk = c.rows(x[10], "BNGK"), a.sv = c.rows(x[11], "BNGV");
    a.F = a.S ? c.size['F'] : 0, a.W = c.size['W'], a.N = c.size['N'], a.scale = c.number(x[9], 1 / std::sqrt((double)c.size['K']));
    c.ok = c.ok && a.q.p && a.k.p && a.v.p && !a.sk.p == !a.sv.p;
    if (a.S) c.ok = c.ok && a.fq.p && a.mix.p && !a.lk.p == !a.lv.p;
    else c.ok = c.ok && !a.fq.p && !a.mix.p && !a.lk.p && !a.lv.p && !a.g.p;
  }
  return c.run(a, subquad_window_linear_step);
}
static Method methods[] = {{"linear_step", (void*)linear_step, FASTCALL, nullptr}, {"window_step", (void*)window_step, FASTCALL, nullptr}};
}  // namespace python

// A Python function: which 0 linear_step, 1 window_step. Null with an error set when Python has no memory; None when the table is of another version.
extern "C" PyObject* subquad_step_function(int64_t which, PyObject* none, PyObject* tensor, PyObject* parameter, const python::Exchange* exchange) {
  if (exchange->major != 1) return Py_IncRef(none), none;
  python::known = {none, tensor, parameter, exchange};
  return PyCFunction_NewEx(&python::methods[which], nullptr, nullptr);
}
"""

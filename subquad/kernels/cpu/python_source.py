"""C++: the steps, and the linear ops where no gradient is asked for, as functions that Python calls with its tensors. A step with nothing to compute takes
4 us, output included, where the checked way in Python and ctypes takes 105 (one run on a busy machine).

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
PyObject* PyTuple_New(intptr_t);
int PyTuple_SetItem(PyObject*, intptr_t, PyObject*);
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
  // Rows [B, H, K] or [B, T, H, K], or one number a head: [B, H] or [B, T, H]. Tokens, if any, are the second letter.
  Tensor rows(PyObject* x, const char* letters, bool tokens = false) {
    View v;
    if (x == known.none || !look(x, v)) return {};
    return rows(v, letters, tokens);
  }
  Tensor rows(const View& v, const char* letters, bool tokens) {
    fit(v, letters);
    if (!ok) return {};
    int heads = tokens ? 2 : 1;
    if (v.dims > heads + 1) ok = v.strides[heads + 1] == 1 || v.shape[heads + 1] == 1;
    return {(char*)v.data + v.offset, v.strides[0], tokens ? v.strides[1] : 0, v.strides[heads], v.index};
  }
  Tensor decay(PyObject* x, const char* letters, int64_t& mode, bool tokens = false) {  // one number a head, or one a feature
    View v;
    if (x == known.none || !look(x, v)) return {};
    char scalar[4] = {letters[0], letters[1], tokens ? letters[2] : '\0', 0};
    mode = v.dims == (int)strlen(letters) ? VECTOR : SCALAR;
    return rows(v, mode == VECTOR ? letters : scalar, tokens);
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
  Map map(PyObject* const* x, int64_t& F) {  // five numbers of features.py; F: what it makes of Y
    Map m = {(int64_t)number(x[0], 0), (int64_t)number(x[1], 0), number(x[2], 0), number(x[3], 0), number(x[4], 0)};
    F = size['Y'] * (m.signs ? m.signs : 1);
    return m;
  }
  bool whole() { return ok = ok && size['H'] % size['G'] == 0; }
};
static PyObject* none() { return Py_IncRef(known.none), known.none; }
struct Made {  // a new tensor [a, b, c, d], or [a, b, c] where d is 0
  Managed* made = nullptr;
  int64_t shape[4], strides[4];
  View like;
  Made(bool wanted, bool bf16, int64_t a, int64_t b, int64_t c, int64_t d = 0) : shape{a, b, c, d} {
    like = {nullptr, 1, 0, d ? 4 : 3, (uint8_t)(bf16 ? 4 : 2), (uint8_t)(bf16 ? 16 : 32), 1, shape, strides, 0};
    int64_t n = 1;
    for (int i = like.dims - 1; i >= 0; n *= shape[i--]) strides[i] = n;
    if (wanted && known.exchange->allocate(&like, &made, nullptr, [](void*, const char*, const char*) {})) made = nullptr;
  }
  ~Made() { if (made) made->deleter(made); }
  char* data() const { return made ? (char*)made->view.data : nullptr; }
  Tensor rows() const { return {data(), strides[0], strides[1], strides[2], like.code == 4}; }
  PyObject* give() {  // null when Python cannot have it
    PyObject* out = nullptr;
    if (made && known.exchange->to(made, (void**)&out)) PyErr_Clear(), out = nullptr;
    made = nullptr;
    return out;
  }
};
template <class Args>
static void released(const Args& a, void (*run)(const Args*)) {
  void* thread = PyEval_SaveThread();
  run(&a);
  PyEval_RestoreThread(thread);
}
static PyObject* run_step(Call& c, StepArgs& a, void (*step)(const StepArgs*)) {
  if (!c.whole()) return none();
  a.B = c.size['B'], a.G = c.size['G'], a.K = c.size['K'], a.V = c.size['V'], a.R = c.size['H'] / a.G;
  Made o(true, false, a.B, c.size['H'], a.V);
  if (!(a.o = (float*)o.data())) return none();
  released(a, step);
  PyObject* out = o.give();
  return out ? out : none();
}
// (o [B, T, H, V] in the dtype of v, state [B, G, F, last] or None)
template <class Args>
static PyObject* run_op(Call& c, Args& a, bool final, int64_t F, int64_t last, void (*op)(const Args*)) {
  if (!c.whole() || a.v.type == 2) return none();
  a.N = c.size['B'], a.G = c.size['G'], a.V = c.size['V'], a.R = c.size['H'] / a.G, a.Y = c.size['Y'];
  std::vector<int64_t> seq;
  for (int64_t b = 0; b < a.N; b++) seq.insert(seq.end(), {b, 0, c.size['T']});
  a.seq = seq.data();
  Made o(true, a.v.type == 1, a.N, c.size['T'], c.size['H'], a.V), state(final, false, a.N, a.G, F, last);
  if (!o.made || final != !!state.made) return none();
  a.o = o.rows(), a.hT = (float*)state.data();
  released(a, op);
  PyObject *out = o.give(), *hT = final ? state.give() : none(), *both = out && hT ? PyTuple_New(2) : nullptr;
  if (!both) {
    if (out) Py_DecRef(out);
    if (hT) Py_DecRef(hT);
    return PyErr_Clear(), none();
  }
  PyTuple_SetItem(both, 0, out), PyTuple_SetItem(both, 1, hT);
  return both;
}
// q, k, v, beta or None, state, log_decay or None, scale
static PyObject* linear_step(Call& c, StepArgs& a, PyObject* const* x) {
  a.q = c.rows(x[0], "BHK"), a.k = c.rows(x[1], "BGK"), a.v = c.rows(x[2], "BGV"), a.beta = c.rows(x[3], "BG"), a.S = c.state(x[4], "BGKV");
  a.g = c.decay(x[5], "BGK", a.mode), a.scale = c.number(x[6], 1.0);
  c.ok = c.ok && a.q.p && a.k.p && a.v.p && a.S && !(a.beta.p && a.mode == VECTOR);
  return run_step(c, a, subquad_linear_step);
}
// q, k, v, fq, mix, state, left_fk, left_v, log_decay, scale, sink_k, sink_v; None where there is none
static PyObject* window_step(Call& c, StepArgs& a, PyObject* const* x) {
  a.q = c.rows(x[0], "BHK"), a.k = c.rows(x[1], "BWGK", true), a.v = c.rows(x[2], "BWGV", true), a.fq = c.rows(x[3], "BHF"), a.mix = c.rows(x[4], "BH");
  c.size['X'] = c.size['V'] + 1;
  a.S = c.state(x[5], "BGFX"), a.lk = c.rows(x[6], "BGF"), a.lv = c.rows(x[7], "BGV"), a.g = c.decay(x[8], "BGF", a.mode);
  a.sk = c.rows(x[10], "BNGK", true), a.sv = c.rows(x[11], "BNGV", true);
  a.F = a.S ? c.size['F'] : 0, a.W = c.size['W'], a.N = c.size['N'], a.scale = c.number(x[9], 1 / std::sqrt((double)c.size['K']));
  c.ok = c.ok && a.q.p && a.k.p && a.v.p && !a.sk.p == !a.sv.p;
  if (a.S) c.ok = c.ok && a.fq.p && a.mix.p && !a.lk.p == !a.lv.p;
  else c.ok = c.ok && !a.fq.p && !a.mix.p && !a.lk.p && !a.lv.p && !a.g.p;
  return run_step(c, a, subquad_window_linear_step);
}
// q, k, v, beta or None, log_decay or None, initial state or None, scale, is the final state wanted, threads, a map's five numbers
static PyObject* linear(Call& c, LinearArgs& a, PyObject* const* x) {
  a.q = c.rows(x[0], "BTHY", true), a.k = c.rows(x[1], "BTGY", true), a.v = c.rows(x[2], "BTGV", true);
  a.map = c.map(x + 9, a.K), c.size['F'] = a.K;
  a.beta = c.rows(x[3], "BTG", true), a.g = c.decay(x[4], "BTGF", a.mode, true), a.h0 = c.state(x[5], "BGFV");
  a.scale = c.number(x[6], 1), a.threads = c.number(x[8], 1);
  c.ok = c.ok && a.q.p && a.k.p && a.v.p && !(a.beta.p && (a.mode == VECTOR || a.map.signs)) && !a.beta.type && !a.g.type;
  return run_op(c, a, c.number(x[7], 0) != 0, a.K, c.size['V'], a.beta.p ? subquad_delta : subquad_additive);
}
// q, k, v, fq, fk, mix, log_decay, initial state, sink_k, sink_v, window, sinks, position, scale, final, threads, a map's five numbers
static PyObject* window_linear(Call& c, WindowArgs& a, PyObject* const* x) {
  a.q = c.rows(x[0], "BTHK", true), a.k = c.rows(x[1], "BXGK", true), a.v = c.rows(x[2], "BXGV", true);
  a.fq = c.rows(x[3], "BTHY", true), a.fk = c.rows(x[4], "BXGY", true), a.mix = c.rows(x[5], "BTH", true);
  a.map = c.map(x + 16, a.F), c.size['F'] = a.F, c.size['W'] = c.size['V'] + 1, a.K = c.size['K'];
  a.g = c.decay(x[6], "BTGF", a.mode, true), a.h0 = c.state(x[7], "BGFW"), a.sk = c.rows(x[8], "BNGK", true), a.sv = c.rows(x[9], "BNGV", true);
  a.window = c.number(x[10], 0), a.sinks = c.number(x[11], 0), a.position = c.number(x[12], 0), a.threads = c.number(x[15], 1);
  a.scale = c.number(x[13], 1 / std::sqrt((double)a.K)), a.before = c.size['X'] - c.size['T'], a.own_sinks = a.sk.p != nullptr;
  c.ok = c.ok && a.q.p && a.k.p && a.v.p && a.fq.p && a.fk.p && a.mix.p && !a.sk.p == !a.sv.p && !a.mix.type && !a.g.type;
  c.ok = c.ok && a.window > 0 && a.sinks >= 0 && a.before >= 0 && a.before <= a.position && (a.sk.p || !a.sinks || !a.position);
  if (a.sk.p) a.sinks = c.size['N'];
  else a.sk = a.k, a.sv = a.v;
  return run_op(c, a, c.number(x[14], 0) != 0, a.F, c.size['W'], subquad_window_linear);
}
template <class Args, PyObject* (*run)(Call&, Args&, PyObject* const*), int COUNT>
static PyObject* method(PyObject*, PyObject* const* x, int64_t count) {
  Call c;
  Args a = {};
  return count == COUNT ? run(c, a, x) : none();
}
static Method methods[] = {
    {"linear_step", (void*)method<StepArgs, linear_step, 7>, FASTCALL, nullptr},
    {"window_step", (void*)method<StepArgs, window_step, 12>, FASTCALL, nullptr},
    {"linear", (void*)method<LinearArgs, linear, 14>, FASTCALL, nullptr},
    {"window_linear", (void*)method<WindowArgs, window_linear, 21>, FASTCALL, nullptr},
};
}  // namespace python

// A Python function: which of `methods`. Null with an error set when Python has no memory; None when the table is of another version.
extern "C" PyObject* subquad_python_function(int64_t which, PyObject* none, PyObject* tensor, PyObject* parameter, const python::Exchange* exchange) {
  if (exchange->major != 1) return Py_IncRef(none), none;
  python::known = {none, tensor, parameter, exchange};
  return PyCFunction_NewEx(&python::methods[which], nullptr, nullptr);
}
"""

"""The converted model as transformers sees it: its config, how it is built from one, and how it is loaded.

In memory a student is an ordinary instance of the teacher's class (a subclass of it, so that saving writes a student). On disk its model type
is ours: plain transformers refuses the folder instead of running the softmax teacher with the student's weights (DESIGN section 7).

This module and everything it imports is also written into student folders, so that they load with trust_remote_code and without the package
(bundle.py). It may import only torch, transformers and modules of this package that obey the same rule.
"""

import copy
import importlib
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from subquad.errors import UserError, first_line
from subquad.linearize.plan import Plan
from subquad.linearize.seam import is_causal, seams
from subquad.linearize.surgery import attach, detach

MODEL_TYPE = "subquad"
# Written by transformers for the folder it saves, of no meaning inside another config.
_NOT_THE_TEACHERS = ("_name_or_path", "transformers_version", "auto_map", "architectures")


class SubquadConfig(PreTrainedConfig):
    """teacher: the teacher's config as a dict with its model_type; plan: Plan.to_dict(); provenance: where the student comes from."""

    model_type = MODEL_TYPE

    def __init__(
        self, teacher: dict[str, Any] | None = None, plan: dict[str, Any] | None = None, provenance: dict[str, Any] | None = None, **kwargs
    ):
        self.teacher, self.plan, self.provenance = teacher or {}, plan or {}, provenance or {}
        super().__init__(**kwargs)

    def teacher_config(self) -> PreTrainedConfig:
        """The teacher's config object; model types are looked up in transformers' own table."""
        data = copy.deepcopy(self.teacher) if isinstance(self.teacher, dict) else {}
        model_type = data.pop("model_type", None)
        if not isinstance(model_type, str):
            raise UserError("This config.json names no teacher: the folder was not written by subquad, or is damaged.")
        if model_type not in CONFIG_MAPPING:
            raise UserError(
                f"This student was made from a {model_type!r} model, which the installed transformers does not know. Upgrade transformers."
            )
        try:
            config = AutoConfig.for_model(model_type, **data)
        except Exception as error:  # each family checks its numbers in its own way
            raise UserError(
                f"The teacher's part of config.json is no config of a {model_type!r} model ({_reason(error)}). Save or download the student again."
            ) from error
        config.dtype = self.dtype or config.dtype
        config._attn_implementation = self._attn_implementation
        return config


def _reason(error: Exception) -> str:
    """What a check of a config says: its first line is often only where it was made."""
    return first_line(error.__cause__ or error)


class SubquadForCausalLM(PreTrainedModel):
    """Stands for students in transformers' auto classes; loading gives an instance of the teacher's class with its mixers in place."""

    config_class = SubquadConfig

    @classmethod
    def from_pretrained(cls, folder, *args, config: SubquadConfig | None = None, **kwargs):
        """As PreTrainedModel.from_pretrained. UserError when weights are missing or do not belong to the model."""
        if config is None:
            config = SubquadConfig.from_pretrained(folder)
        wanted_info = kwargs.pop("output_loading_info", False)
        kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)  # refused below, in one sentence with the rest
        model, info = _loader(config).from_pretrained(folder, *args, config=config.teacher_config(), **kwargs)
        if found := misfits(info, "missing", "unexpected", "mismatched"):
            raise UserError(
                f"{folder}: the weights do not fit the plan in config.json ({found}). The folder is damaged or was edited; save the student again."
            )
        model.subquad_provenance = config.provenance
        return (model, info) if wanted_info else model

    @classmethod
    def _from_config(cls, config: SubquadConfig, **kwargs):
        return _loader(config)._from_config(config.teacher_config(), **kwargs)


def misfits(info: dict[str, Any], *kinds: str) -> str:
    """What from_pretrained's loading info says of weights that do not fit ("3 missing, 0 unexpected, for example a.weight"); nothing when all do.

    transformers warns and fills the gaps with random numbers, which neither a teacher nor a student should have.
    """
    words = {"missing": "missing", "unexpected": "unexpected", "mismatched": "of another shape"}
    names = {kind: sorted(key if isinstance(key, str) else key[0] for key in info[f"{kind}_keys"]) for kind in kinds}
    found = [name for those in names.values() for name in those]
    counts = ", ".join(f"{len(those)} {words[kind]}" for kind, those in names.items())
    return f"{counts}, for example {found[0]}" if found else ""


def _loader(config: SubquadConfig) -> type[PreTrainedModel]:
    """The teacher's class, converting itself on construction so that from_pretrained finds every parameter in its place."""
    teacher = config.teacher_config()
    base, plan = _teacher_class(teacher), Plan.from_dict(config.plan)

    def __init__(self, config, *args, **kwargs):
        base.__init__(self, config, *args, **kwargs)
        attach(self, plan)

    # Mixers are small and keep fp32 statistics: loading in bf16 or fp16 leaves them as they were saved.
    fp32 = [*(base._keep_in_fp32_modules_strict or ()), *(f"{layer.name}.mixer" for layer in plan.converted)]
    return student_class(base, {"__init__": __init__, "_keep_in_fp32_modules_strict": fp32})


def _teacher_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' causal model of a config. The text part of a larger config stands beside a model that is listed under the whole."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    listed = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for name, cls in vars(modeling).items():
        if name in listed and cls.config_class is type(config):
            return cls
    raise UserError(f"transformers has no causal language model for {config.model_type!r}.")


def student_class(base: type[PreTrainedModel], more: dict[str, Any] | None = None) -> type[PreTrainedModel]:
    """A subclass of the teacher's class, under its name, whose save_pretrained writes a student folder."""
    members = {
        "__reduce_ex__": _reduce_ex,
        "save_pretrained": _save_pretrained,
        "teacher_class": base,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        **(more or {}),
    }
    return type(base.__name__, (base,), members)


def _reduce_ex(self, protocol):
    """A class made here cannot be found by its name: copies and pickles make it again."""
    _, _, *state = object.__reduce_ex__(self, protocol)
    return _blank, (type(self).teacher_class,), *state


def _blank(base: type[PreTrainedModel]) -> PreTrainedModel:
    """A student without its modules, which come with the pickle's state."""
    cls = _plain_class(base)
    return cls.__new__(cls)


_plain_class = cache(student_class)  # one for all students, so that a copy is of its original's class


def student_config(model: PreTrainedModel) -> SubquadConfig:
    """The config to write for a converted model."""
    teacher = model.config.to_diff_dict()
    for key in (*_NOT_THE_TEACHERS, "quantization_config"):
        teacher.pop(key, None)
    teacher["model_type"] = model.config.model_type
    config = SubquadConfig(
        teacher=teacher,
        plan=model.subquad_plan.to_dict(),
        provenance=getattr(model, "subquad_provenance", {}),
        architectures=[SubquadForCausalLM.__name__],
        auto_map={"AutoConfig": "modeling_subquad.SubquadConfig", "AutoModelForCausalLM": "modeling_subquad.SubquadForCausalLM"},
        dtype=next(model.parameters()).dtype,
        tie_word_embeddings=getattr(model.config, "tie_word_embeddings", False),
    )
    # What tools ask every language model's config for.
    for key in (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ):
        try:
            value = getattr(model.config, key, None)
        except Exception:  # transformers' own refusal of a number that differs from layer to layer
            continue
        if value is not None:
            setattr(config, key, value)
    return config


def _save_pretrained(self, save_directory, **kwargs):
    """As PreTrainedModel.save_pretrained, with the student's config and the code that loads it without the package."""
    if not all(is_causal(seam.module) for seam in seams(self)):
        raise UserError(
            f"A student folder holds a causal language model, and this {type(self).__name__} is an encoder. Keep its weights with "
            "safetensors.torch.save_file(model.state_dict(), FILE) and the plan with model.subquad_plan.to_dict(); convert the teacher again to load them."
        )
    type(self).teacher_class.save_pretrained(self, save_directory, **kwargs)
    if kwargs.get("is_main_process", True):
        config = student_config(self)
        config.save_pretrained(save_directory)
        _write_code(Path(save_directory))
        if kwargs.get("push_to_hub"):
            raise UserError(
                "Save first, then upload the folder (huggingface_hub.upload_folder): a student's config and code are written after its weights."
            )


def _write_code(folder: Path) -> None:
    """The files that load this student without the package: made from the package, or copied on when this code is itself such a copy."""
    if __name__ == "subquad.linearize.student":
        importlib.import_module("subquad.linearize.bundle").write(folder)
        return
    for path in Path(__file__).parent.glob("*subquad*.py"):
        shutil.copyfile(path, folder / path.name)


def convert(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Carry out a plan on a model in place; returns the same object."""
    attach(model, plan)
    model.__class__ = _plain_class(type(model))
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Take the mixers out again; returns the same object, of the teacher's class, with its present weights."""
    detach(model)
    model.__class__ = type(model).teacher_class
    return model


AutoConfig.register(MODEL_TYPE, SubquadConfig, exist_ok=True)
AutoModelForCausalLM.register(SubquadConfig, SubquadForCausalLM, exist_ok=True)

"""Weight Steering: contrastive steering vectors in weight space (Fierro & Roger 2025, arXiv 2511.05408).

The public names load on first use, so that `import ws` is quick.
"""

from __future__ import annotations

import logging
import sys
import warnings
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ws.adapters import AdapterSpec as AdapterSpec
    from ws.analysis.monitor import Monitor as Monitor
    from ws.analysis.monitor import MonitorCallback as MonitorCallback
    from ws.analysis.prevention import steer_training as steer_training
    from ws.behaviors import Behavior as Behavior
    from ws.behaviors import load_behavior as load_behavior
    from ws.data import generate_pairs as generate_pairs
    from ws.delta import LinearDelta as LinearDelta
    from ws.diff import SteeringVector as SteeringVector
    from ws.errors import WsError as WsError
    from ws.eval.airisk import evaluate_airisk as evaluate_airisk
    from ws.eval.answers import evaluate_answers as evaluate_answers
    from ws.eval.arithmetic import evaluate_arithmetic as evaluate_arithmetic
    from ws.eval.capability import evaluate_capability as evaluate_capability
    from ws.eval.evaluation import Evaluation as Evaluation
    from ws.eval.evaluation import HeadlineScore as HeadlineScore
    from ws.eval.preference import evaluate_preference as evaluate_preference
    from ws.eval.statements import evaluate_statements as evaluate_statements
    from ws.eval.sycophancy import evaluate_sycophancy as evaluate_sycophancy
    from ws.eval.tinymfv_airisk import evaluate_tinymfv_airisk as evaluate_tinymfv_airisk
    from ws.eval.truthfulqa import evaluate_truthfulqa as evaluate_truthfulqa
    from ws.intervene.calibration import calibrate as calibrate
    from ws.lm.models import load_model as load_model
    from ws.steer import steer as steer
    from ws.steer import steer_many as steer_many
    from ws.train import train_adapter as train_adapter

_HOME = {
    "AdapterSpec": "ws.adapters",
    "Behavior": "ws.behaviors",
    "Evaluation": "ws.eval.evaluation",
    "HeadlineScore": "ws.eval.evaluation",
    "LinearDelta": "ws.delta",
    "Monitor": "ws.analysis.monitor",
    "MonitorCallback": "ws.analysis.monitor",
    "SteeringVector": "ws.diff",
    "WsError": "ws.errors",
    "calibrate": "ws.intervene.calibration",
    "evaluate_airisk": "ws.eval.airisk",
    "evaluate_answers": "ws.eval.answers",
    "evaluate_arithmetic": "ws.eval.arithmetic",
    "evaluate_capability": "ws.eval.capability",
    "evaluate_preference": "ws.eval.preference",
    "evaluate_statements": "ws.eval.statements",
    "evaluate_sycophancy": "ws.eval.sycophancy",
    "evaluate_tinymfv_airisk": "ws.eval.tinymfv_airisk",
    "evaluate_truthfulqa": "ws.eval.truthfulqa",
    "generate_pairs": "ws.data",
    "load_behavior": "ws.behaviors",
    "load_model": "ws.lm.models",
    "steer": "ws.steer",
    "steer_many": "ws.steer",
    "steer_training": "ws.analysis.prevention",
    "train_adapter": "ws.train",
}
__all__ = sorted(_HOME)

# Where modules lay before they had rooms.
_FORMER = {
    **{name: f"lm.{name}" for name in ("models", "hub", "checkpoints", "probe", "sampling", "divergence")},
    **{f"eval.{name}": f"lm.{name}" for name in ("choice", "rollout", "likelihood")},
    **{name: f"intervene.{name}" for name in ("interventions", "calibration", "calibrate")},
    **{name: f"analysis.{name}" for name in ("compare", "compare_tables", "compose", "controls", "geometry")},
    **{name: f"analysis.{name}" for name in ("monitor", "slope", "sweep_tables", "trim")},
    "runs": "files.runs",
    "tensor_files": "files.tensors",
    "gguf_base": "files.gguf",
    "plots": "files.plots",
    "eval.stats": "stats",
    "eval.tables": "behaviors.tables",
    "acting": "behaviors.acting",
    "finished": "run",
    "baselines": "intervene",
    "baselines.activation": "intervene.activation",
    "baselines.prompt": "intervene.prompt",
    "playground": "chat.page",
    "session": "chat.engine",
    "fine_tunes": "diff",
    "queue": "sweep.queue",
    "queue_jobs": "sweep.jobs",
    "queue_backends": "sweep.backends",
}
_MOVED = {f"ws.{old}": f"ws.{new}" for old, new in _FORMER.items()}


class _Former(MetaPathFinder, InspectLoader):
    """Imports, and `python -m`, of a module's former name go to where it is now, with a `DeprecationWarning`."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(new)

    def get_code(self, fullname: str) -> CodeType:
        new = _MOVED[fullname]
        return compile(f"import runpy; runpy.run_module({new!r}, run_name='__main__', alter_sys=True)", new, "exec")

    def get_source(self, fullname: str) -> None:
        return None


# First of all: `ws.baselines.activation` would be found below `ws.intervene`, a second time.
sys.meta_path.insert(0, _Former())

# PEFT imports bitsandbytes where it is installed, which reports a kernel that only packed weights on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in str(record.msg))


class _Package(ModuleType):
    """The `ws` module, where a public name always wins over the submodule of that name.

    Importing `ws.steer` would otherwise bind the submodule over the function `ws.steer`; the import system does so
    with a plain `setattr` after the submodule has loaded.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("weight-steering")
        if name not in _HOME:
            if name in _FORMER:
                return import_module(f"ws.{name}")
            raise AttributeError(f"module 'ws' has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        super().__setattr__(name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package

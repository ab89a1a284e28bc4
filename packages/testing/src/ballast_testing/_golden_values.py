"""JSON values to arguments, and returned values against JSON values: the arithmetic under the golden runner."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

_CONTAINERS = r"(?:list|List|Sequence|Iterable|Collection|tuple|Tuple)"
_LIST_OF_TENSORS = re.compile(_CONTAINERS + r"\[\s*(?:torch\.)?\w*Tensor")
_LIST = re.compile(r"\b" + _CONTAINERS + r"\b")
_ARRAY = re.compile(r"ndarray|NDArray|ArrayLike")
_NUMBER = re.compile(r"\b(?:float|int|bool|Number|Real|Any|object)\b")
_INDEX_NAME = re.compile(r"index|edge|_ids?$|^ids?$|request|position|user|item")


def leaves(value: Any) -> Iterator[Any]:
    """Yield what a nested list holds."""
    if isinstance(value, list):
        for element in value:
            yield from leaves(element)
    else:
        yield value


def is_rectangular(value: Any) -> bool:
    """Tell whether a nested list has one length per level."""
    if not isinstance(value, list):
        return True
    shapes = {_shape(element) for element in value}
    return len(shapes) <= 1 and None not in shapes


def _shape(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return ()
    shapes = {_shape(element) for element in value}
    if not shapes:
        return (0,)
    inner = shapes.pop() if len(shapes) == 1 else None
    return None if inner is None else (len(value), *inner)


def kind_of(value: Any) -> str | None:
    """Name what the leaves are: "float", "int", "bool", "str", or None if there are none or no one kind."""
    kinds = {type(leaf).__name__ for leaf in leaves(value)}
    if kinds <= {"int", "float"} and kinds:
        return "float" if "float" in kinds else "int"
    return kinds.pop() if len(kinds) == 1 and kinds <= {"bool", "str"} else None


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a callable, empty where Python can't tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def wanted(parameter: inspect.Parameter | None) -> str:
    """Read off an annotation what a list becomes: "tensor", "tensors", "array", "python" or "auto"."""
    if parameter is None or parameter.annotation is inspect.Parameter.empty:
        return "auto"
    text = annotation_text(parameter)
    if "Tensor" in _LIST_OF_TENSORS.sub("", text):
        return "tensor"
    if "Tensor" in text:
        return "tensors"
    if _ARRAY.search(text):
        return "array"
    return "python" if _LIST.search(text) else "auto"


def annotation_text(parameter: inspect.Parameter) -> str:
    """Return the annotation as it is written."""
    annotation = parameter.annotation
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def takes_only_tensor(parameter: inspect.Parameter | None) -> bool:
    """Tell whether the signature asks for a tensor and nothing else."""
    if wanted(parameter) != "tensor" or parameter is None:
        return False
    text = annotation_text(parameter)
    return not (_NUMBER.search(text) or _LIST.search(text) or _ARRAY.search(text))


def to_argument(
    name: str, value: Any, want: str = "auto", *, kind: str | None = None, dtype: str = "float64", learned: bool = False
) -> Any:
    """Turn one JSON input into the argument of the function.

    Args:
        name: Name of the input; decides between indices and floats when an empty list gives no other hint.
        value: The JSON value.
        want: Result of `wanted` for the parameter.
        kind: What this input holds in the other cases of the file, for empty lists.
        dtype: dtype of floating tensors.
        learned: Whether the case expects a gradient for this input.

    Returns:
        Lists as tensors (float64, int64, bool), dicts of lists as dicts of tensors; strings, None, numbers and lists
        that hold strings or None stay what they are.
    """
    if isinstance(value, dict):
        return {key: to_argument(key, entry, want, dtype=dtype, learned=learned) for key, entry in value.items()}
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return _tensor(value, None, dtype, learned=learned) if learned else value
    if want == "python" or any(leaf is None or isinstance(leaf, str) for leaf in leaves(value)):
        return value
    empty = not any(True for _ in leaves(value))
    if empty and want == "auto" and kind == "str":
        return value
    if want == "tensors" or not is_rectangular(value):
        # Lists of id lists of different lengths stay Python; lists of matrices are lists of tensors.
        if want not in ("tensor", "tensors") and kind_of(value) != "float" and _depth(value) < 3:
            return value
        return [to_argument(name, element, "tensor", kind=kind, dtype=dtype, learned=learned) for element in value]
    fallback = kind or ("int" if _INDEX_NAME.search(name) else "float")
    kind = fallback if empty else None  # what isn't empty says itself what it holds
    return _array(value, kind, dtype) if want == "array" else _tensor(value, kind, dtype, learned=learned)


def _depth(value: Any) -> int:
    return 1 + max((_depth(element) for element in value), default=0) if isinstance(value, list) else 0


def _array(value: Any, kind: str | None, dtype: str) -> np.ndarray[Any, Any]:
    import numpy as np

    types = {"int": np.int64, "bool": np.bool_, "float": np.float64}
    array = np.asarray(value) if kind is None else np.asarray(value, dtype=types.get(kind, np.float64))
    return array.astype(dtype) if array.dtype.kind == "f" else array


def _tensor(value: Any, kind: str | None, dtype: str, *, learned: bool) -> Any:
    import torch

    # What gets a gradient is floating, even if every number in the file happens to be written as an integer.
    kind = "float" if learned else kind
    return torch.from_numpy(_array(value, kind, dtype).copy()).requires_grad_(learned)


def tensors_in(value: Any) -> list[Any]:
    """Return the tensors of a (nested) argument in order."""
    if isinstance(value, Mapping):
        return [tensor for entry in value.values() for tensor in tensors_in(entry)]
    if isinstance(value, (list, tuple)):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    return [value] if is_tensor(value) else []


def is_tensor(value: Any) -> bool:
    """Tell tensors without importing torch where nobody else has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def plain(value: Any) -> Any:
    """Turn tensors and numpy values into arrays and Python scalars."""
    import numpy as np

    if is_tensor(value):
        dense = value.detach().cpu()
        dense = dense.to_dense() if dense.layout is not sys.modules["torch"].strided else dense
        value = (dense.float() if str(dense.dtype) in ("torch.bfloat16", "torch.float16") else dense).numpy()
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value


def compare(actual: Any, expected: Any, rtol: float, atol: float) -> str | None:
    """Return what differs first, or None.

    Numbers are close if `|actual - expected| <= atol + rtol * |expected|`; NaN equals nothing; integers are compared
    exactly; booleans equal only booleans; shapes, lengths and key sets must agree.
    """
    if isinstance(expected, dict):
        return _compare_mapping(actual, expected, rtol, atol)
    actual = plain(actual)
    if isinstance(expected, list):
        return _compare_list(actual, expected, rtol, atol)
    if expected is None or isinstance(expected, (str, bool)):
        same = type(actual) is type(expected) and actual == expected
        return None if same else f"got {_short(actual)}, expected {expected!r}"
    if isinstance(actual, bool) or not isinstance(actual, (int, float)):
        return f"got {_short(actual)}, expected the number {expected!r}"
    if isinstance(expected, int) and isinstance(actual, int):
        return None if actual == expected else f"got {actual!r}, expected {expected!r}"
    close = actual == expected or abs(actual - expected) <= atol + rtol * abs(expected)
    # inf - inf is NaN and inf <= inf is true: an infinite tolerance must not accept a finite number.
    if close and (actual == expected or math.isfinite(expected)):
        return None
    return f"got {actual!r}, expected {expected!r} (rtol={rtol}, atol={atol})"


def _compare_mapping(actual: Any, expected: dict[str, Any], rtol: float, atol: float) -> str | None:
    if not isinstance(actual, Mapping):
        return f"got {_short(actual)}, expected a mapping with the keys {sorted(expected)}"
    got = {str(key): value for key, value in actual.items()}
    if set(got) != set(expected):
        return f"got the keys {sorted(got)}, expected {sorted(expected)}"
    for key, value in expected.items():
        if message := compare(got[key], value, rtol, atol):
            return f"[{key!r}]: {message}"
    return None


def _compare_list(actual: Any, expected: list[Any], rtol: float, atol: float) -> str | None:
    import numpy as np

    if kind_of(expected) in ("float", "int", "bool") and is_rectangular(expected):
        array = _numeric(actual)
        if array is not None:
            return _compare_array(array, np.asarray(expected), rtol, atol)
    if isinstance(actual, np.ndarray):
        actual = list(actual)
    if isinstance(actual, (str, Mapping)) or not isinstance(actual, Sequence):
        return f"got {_short(actual)}, expected a sequence of {len(expected)}"
    if len(actual) != len(expected):
        return f"got {len(actual)} elements, expected {len(expected)}"
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if message := compare(one, other, rtol, atol):
            return f"[{i}]: {message}"
    return None


def _numeric(value: Any) -> np.ndarray[Any, Any] | None:
    """Return one numeric array, or None where the value is ragged or not numeric."""
    import numpy as np

    def unpack(entry: Any) -> Any:
        entry = plain(entry)
        return [unpack(element) for element in entry] if isinstance(entry, (list, tuple)) else entry

    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "fiub" else None
    if not isinstance(value, (list, tuple)):
        return None
    try:
        array = np.asarray(unpack(value))
    except (ValueError, TypeError):
        return None
    return array if array.dtype.kind in "fiub" else None


def _compare_array(
    actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], rtol: float, atol: float
) -> str | None:
    import numpy as np

    if expected.size == 0 and actual.size == 0 and expected.shape in ((0,), actual.shape):
        return None  # JSON can't write the trailing dimensions of an empty array
    if actual.shape != expected.shape:
        return f"got shape {actual.shape}, expected {expected.shape}"
    if (expected.dtype.kind == "b") != (actual.dtype.kind == "b") and expected.dtype.kind == "b":
        return f"got dtype {actual.dtype}, expected booleans"
    if expected.dtype.kind in "iub" and actual.dtype.kind in "iub":
        good = actual == expected
    else:
        actual, expected = actual.astype(np.float64), expected.astype(np.float64)
        with np.errstate(invalid="ignore"):
            near = np.abs(actual - expected) <= atol + rtol * np.abs(expected)
        good = (actual == expected) | (near & np.isfinite(expected))
    if bool(np.all(good)):
        return None
    where = tuple(int(i) for i in np.argwhere(~good)[0])
    bad = int(np.sum(~good))
    return (
        f"got {actual[where].item()!r}, expected {expected[where].item()!r} at {list(where)}, "
        f"{bad} of {expected.size} differ (rtol={rtol}, atol={atol})"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"

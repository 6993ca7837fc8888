"""What the layer refuses of its inputs, on every backend in the same words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.moe_core import build_moe_layer
from twinmoe.testing.conftest import load_or_skip

WIDTH = 8


@pytest.fixture(params=("reference", "cpu", "mindspore-cpu"), scope="module")
def home(request: pytest.FixtureRequest) -> Any:
    return load_or_skip(request.param)


@pytest.fixture(scope="module")
def layer(home: Any) -> Any:
    return build_moe_layer({"num_experts": 4, "expert_hidden_size": 8}, backend=home, hidden_size=WIDTH)


def floats(home: Any, *shape: int) -> Any:
    return home.ops.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("shape", [(6, 2 * WIDTH), (6, WIDTH // 2), (2, 3, WIDTH + 1)])
def test_another_width_is_not_cut_into_tokens(home: Any, layer: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"x of shape .*{shape[-1]}\) does not end with hidden_size={WIDTH}"):
        layer(floats(home, *shape))


def test_inputs_may_be_named(home: Any, layer: Any) -> None:
    x, real = floats(home, 3, WIDTH), home.ops.asarray(np.array([True, False, True]))
    by_place, by_name = layer(x, real).y, layer(x=x, real=real).y
    np.testing.assert_array_equal(home.ops.to_numpy(by_name), home.ops.to_numpy(by_place))
    assert not home.ops.to_numpy(by_name)[1].any()


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_a_mask_is_boolean(home: Any, layer: Any, dtype: type) -> None:
    with pytest.raises(TypeError, match="pass a boolean mask"):
        layer(floats(home, 3, WIDTH), real=home.ops.asarray(np.ones(3, dtype)))


def test_a_mask_has_one_entry_a_token(home: Any, layer: Any) -> None:
    with pytest.raises(ValueError, match=r"real of shape \(2,\) does not say which tokens"):
        layer(floats(home, 3, WIDTH), real=home.ops.asarray(np.ones(2, bool)))


def test_integers_are_no_tokens(home: Any, layer: Any) -> None:
    with pytest.raises(TypeError, match="pass a floating tensor"):
        layer(home.ops.asarray(np.ones((3, WIDTH), np.int64)))


@pytest.mark.parametrize("given", [[[0.0] * WIDTH], np.zeros((3, WIDTH)), None])
def test_what_is_no_tensor_is_no_tokens(layer: Any, given: Any) -> None:
    with pytest.raises(TypeError, match="pass a floating tensor"):
        layer(given)

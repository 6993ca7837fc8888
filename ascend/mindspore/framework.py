"""MindSpore's operators without their declared types, which call most results optional or leave methods out."""

from __future__ import annotations

from typing import Any

import mindspore.mint
import mindspore.ops

mint: Any = mindspore.mint
ops: Any = mindspore.ops

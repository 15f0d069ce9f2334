"""Differential tracing: one flat program from the same function's jaxprs at two batch sizes.

The two jaxprs are walked in step. Calls (`jit`, custom derivatives, `checkpoint`) are spliced into the caller; control
flow keeps its bodies. Where a shape or an integer parameter differs between the sizes it becomes a `Size`; where a
literal differs it is a normaliser and keeps the whole batch's value.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxpar import _jax
from jaxpar.errors import TraceError
from jaxpar.trace.ir import Atom, Body, Eqn, Literal, Size, Var, drop_dead_eqns

logger = logging.getLogger(__name__)

_IGNORED_PARAMS = {"sharding", "out_sharding"}  # layouts under the tracing mesh; the step's own mesh decides
_LAYOUT_OPS = {"sharding_constraint", "reshard"}  # but those that the user asks for are kept
_CONTROL_FLOW = {"scan", "while", "cond"}
_PRINTS = {"debug_callback", "debug_print"}


def pair_jaxprs(whole: Any, small: Any, sizes: tuple[int, int], names: Sequence[str] = ()) -> Body:
    """The program whose traces at `sizes = (B, b)` examples are the closed jaxprs `whole` and `small`.

    Raises: TraceError at the first place where the two differ in more than sizes.
    """
    return _Pairing(sizes).pair_body(whole, small, names)


@dataclass(frozen=True)
class _Context:
    path: tuple[str, ...] = ()
    backward: bool = False
    recomputed: bool = False
    callers: tuple[Any, ...] = ()
    opaque: bool = False  # inside an operation of JAX's, that was traced without the user's code


class _Pairing:
    def __init__(self, sizes: tuple[int, int]):
        self.sizes = sizes
        self._at: tuple[Any, ...] = ()  # the equation under way and the calls around it

    # -- bodies ----------------------------------------------------------------------------------------------------

    def pair_body(self, whole: Any, small: Any, names: Sequence[str] = (), ctx: _Context = _Context()) -> Body:
        (jw, cw), (js, cs) = _jax.open_jaxpr(whole), _jax.open_jaxpr(small)
        env: dict[Any, Atom] = {}
        if len(jw.invars) != len(js.invars) or len(jw.outvars) != len(js.outvars):
            raise TraceError(self._differ("the number of inputs or outputs of a function", None, None))
        names = list(names) or [""] * len(jw.invars)
        inputs = tuple(self._new_var(env, w, s, name) for w, s, name in zip(jw.invars, js.invars, names, strict=True))
        consts = self._pair_consts(env, jw, js, cw, cs)
        eqns: list[Eqn] = []
        self._walk(jw.eqns, js.eqns, env, eqns, consts, ctx)
        outputs = tuple(self._read(env, w, s, consts) for w, s in zip(jw.outvars, js.outvars, strict=True))
        return Body(inputs, drop_dead_eqns(eqns, outputs), outputs, consts)

    def _pair_consts(self, env: dict, jw: Any, js: Any, cw: Sequence, cs: Sequence) -> dict[Var, Any]:
        if len(cw) != len(cs):
            raise TraceError(self._differ("the number of captured constants", None, None))
        consts: dict[Var, Any] = {}
        for vw, vs, value in zip(jw.constvars, js.constvars, cw, strict=True):
            consts[self._new_var(env, vw, vs, "constant")] = value
        return consts

    def _walk(self, whole: Sequence, small: Sequence, env: dict, out: list[Eqn], consts: dict, ctx: _Context) -> None:
        for ew, es in zip(whole, small, strict=False):
            self._pair_eqn(ew, es, env, out, consts, ctx)
        if len(whole) != len(small):
            longer = whole if len(whole) > len(small) else small
            raise TraceError(self._differ("the number of operations", longer[min(len(whole), len(small))], None))

    # -- equations -------------------------------------------------------------------------------------------------

    def _pair_eqn(self, ew: Any, es: Any, env: dict, out: list[Eqn], consts: dict, ctx: _Context) -> None:
        same_arity = len(ew.invars) == len(es.invars) and len(ew.outvars) == len(es.outvars)
        if ew.primitive is not es.primitive or not same_arity:
            raise TraceError(self._differ("the operation", ew, es))
        path, backward, recomputed = _jax.parse_name_stack(_jax.name_stack(ew))
        if ctx.path and path[:1] == ctx.path[-1:]:
            path = path[1:]
        callers = ctx.callers if ctx.opaque else (ew, *ctx.callers)
        ctx = _Context(ctx.path + path, ctx.backward or backward, ctx.recomputed or recomputed, callers, ctx.opaque)
        self._at = ctx.callers
        inputs = tuple(self._read(env, w, s, consts, ew) for w, s in zip(ew.invars, es.invars, strict=True))
        call_w, call_s = _jax.inlined_call(ew), _jax.inlined_call(es)
        if call_w is not None and call_s is not None:
            used = tuple(inputs[i] for i in call_w.inputs)
            inner = replace(ctx, opaque=ctx.opaque or call_w.opaque)
            outputs = self._splice(call_w.body, call_s.body, used, out, consts, inner)
            env.update(zip(ew.outvars, outputs, strict=True))
            return
        if not self._keep_effects(ew):
            return
        params, bodies = self._pair_params(ew, es, ctx)
        made = tuple(self._new_var(env, w, s, eqn=ew) for w, s in zip(ew.outvars, es.outvars, strict=True))
        labels = (ctx.path, ctx.backward, ctx.recomputed)
        out.append(Eqn(ew.primitive, inputs, made, params, bodies, *labels, ctx.callers))

    def _keep_effects(self, eqn: Any) -> bool:
        """Whether the equation stays in the program: prints don't.

        Raises: TraceError where its effects can't be left out.
        """
        if not eqn.effects or eqn.primitive.name in _CONTROL_FLOW:
            return True
        place = _jax.user_frame(eqn) or "an unknown line"
        if eqn.primitive.name in _PRINTS:
            logger.warning("%s: %s is left out of the pipelined step", place, eqn.primitive.name)
            return False
        raise TraceError(
            f"{place}: {eqn.primitive.name} has side effects, and a pipelined step runs its operations in another "
            "order, once for each micro-batch. Do it outside the step, with values that the step returns."
        )

    def _splice(
        self, whole: Any, small: Any, inputs: tuple[Atom, ...], out: list[Eqn], consts: dict, ctx: _Context
    ) -> tuple[Atom, ...]:
        (jw, cw), (js, cs) = _jax.open_jaxpr(whole), _jax.open_jaxpr(small)
        env: dict[Any, Atom] = dict(zip(jw.invars, inputs, strict=True))
        consts.update(self._pair_consts(env, jw, js, cw, cs))
        self._walk(jw.eqns, js.eqns, env, out, consts, ctx)
        return tuple(self._read(env, w, s, consts) for w, s in zip(jw.outvars, js.outvars, strict=True))

    def _pair_params(self, ew: Any, es: Any, ctx: _Context) -> tuple[dict[str, Any], dict[str, tuple[Body, ...]]]:
        params: dict[str, Any] = {}
        bodies: dict[str, tuple[Body, ...]] = {}
        nested = ew.primitive.name in _CONTROL_FLOW
        for key, value in ew.params.items():
            other = es.params[key]
            if key in _IGNORED_PARAMS and ew.primitive.name not in _LAYOUT_OPS:
                params[key] = None
            elif nested and _jax.is_jaxpr(value):
                bodies[key] = (self.pair_body(value, other, ctx=ctx),)
            elif nested and isinstance(value, tuple) and value and all(map(_jax.is_jaxpr, value)):
                bodies[key] = tuple(self.pair_body(w, s, ctx=ctx) for w, s in zip(value, other, strict=True))
            else:
                params[key] = self._merge(value, other, ew, es, key)
        if ew.primitive.name == "scan":
            params["num_consts"], params["num_carry"] = _jax.scan_counts(ew.params, len(ew.invars))
        return params, bodies

    # -- values ----------------------------------------------------------------------------------------------------

    def _new_var(self, env: dict, whole: Any, small: Any, name: str = "", eqn: Any = None) -> Var:
        shape = tuple(self._merge(w, s, eqn, None) for w, s in zip(whole.aval.shape, small.aval.shape, strict=True))
        env[whole] = var = Var(shape, whole.aval.dtype, name)
        return var

    def _read(self, env: dict, whole: Any, small: Any, consts: dict, eqn: Any = None) -> Atom:
        if isinstance(whole, _jax.Literal) != isinstance(small, _jax.Literal):
            raise TraceError(self._differ("a constant", eqn, None))
        if not isinstance(whole, _jax.Literal):
            return env[whole]
        if np.shape(whole.val) != np.shape(small.val):  # an array of the batch's size
            var = self._new_var({}, whole, small, "constant")
            consts[var] = whole.val
            return var
        aval: Any = whole.aval
        equal = np.array_equal(np.asarray(whole.val), np.asarray(small.val), equal_nan=aval.dtype.kind in "fc")
        return Literal(whole.val, aval.dtype, normaliser=not equal)

    def _merge(self, whole: Any, small: Any, ew: Any, es: Any, name: str = "") -> Any:
        """One value for both sizes: itself where they agree, a `Size` where integers differ."""
        if isinstance(whole, int | np.integer) and isinstance(small, int | np.integer) and whole == small:
            return whole
        if _is_size(whole) and _is_size(small):
            return self._size(int(whole), int(small), ew)
        if isinstance(whole, tuple | list) and isinstance(small, tuple | list) and len(whole) == len(small):
            items = [self._merge(w, s, ew, es, name) for w, s in zip(whole, small, strict=True)]
            return type(whole)(*items) if hasattr(whole, "_fields") else type(whole)(items)
        if isinstance(whole, Mapping) and isinstance(small, Mapping) and whole.keys() == small.keys():
            return {k: self._merge(whole[k], small[k], ew, es, name) for k in whole}
        if callable(whole) or _jax.is_jaxpr(whole) or _same(whole, small):
            return whole
        near = next(filter(None, map(_jax.user_frame, self._at)), "an unknown line")
        raise TraceError(
            f"{near}: {ew.primitive.name if ew is not None else 'the step'} can't be evaluated for another number of "
            f"examples: jaxpar can't tell how its parameter '{name}' depends on that. Write it in jax.numpy, or move "
            "it out of the pipelined step."
        )

    def _size(self, whole: int, small: int, eqn: Any) -> Size:
        total, part = self.sizes
        if (whole - small) % (total - part):
            what = f"a size ({whole} against {small}) that doesn't grow evenly, as for groups of several examples,"
            raise TraceError(self._differ(what, eqn, None))
        per_example = (whole - small) // (total - part)
        return Size(per_example, whole - per_example * total)

    def _differ(self, what: str, ew: Any, es: Any) -> str:
        whole, small = self.sizes
        near = next(filter(None, map(_jax.user_frame, self._at)), "an unknown line")
        at = [f"{e.primitive.name} at {_jax.user_frame(e) or near}" for e in (ew, es) if e is not None]
        detail = f": {' against '.join(at)}" if at else ""
        return (
            f"the step does something else with {whole} examples than with {small}: {what} differs{detail}. "
            "A pipelined step runs the same program for every number of examples: take Python decisions on the batch "
            "size (`if x.shape[0] ...`, loops over it) outside the step, or write them with jnp.where."
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return bool(a == b)
    except ValueError:  # arrays
        return bool(np.array_equal(a, b))

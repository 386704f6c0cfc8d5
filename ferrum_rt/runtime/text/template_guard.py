"""The jinja2 environment for chat templates: its sandbox, and a budget that ends a render which takes too much.

jinja2's sandbox hides Python's internals, but loops for ever and makes strings of any length. Here whatever a template does
is paid for before it is done, at the most that it can cost, for an operation of Python's own cannot be stopped half-way. So
no process, thread or signal is needed. What jinja2 does not ask the environment for (loops, literals, slices, comparisons)
is made to pay by a change to the template's syntax tree.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ferrum_rt.runtime.text.template_budget import (
    CONTAINERS,
    FILTER_COSTS,
    MAX_DEPTH,
    STEP,
    Budget,
    TemplateLimitError,
    check_bits,
    keys_cost,
    method_cost,
    operator_cost,
    shallow_size,
)

# Names that hold a space cannot be said in a template.
_BUDGET = "ferrum budget"
_PAY, _COPIED, _MADE, _READ, _CONCAT, _ADD = (
    f"ferrum {name}" for name in ("pay", "copied", "made", "read", "concat", "add")
)
# Filters that take one look, whatever they are given.
_FREE = {"abs", "attr", "count", "d", "default", "first", "last", "length", "random"}
# Those that do not look into the items of what they are given, and those that do so at once, for an iterator too.
_LAZY = {"batch", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice"}
_GATHERING = {"groupby", "join", "max", "min", "sort", "sum", "unique"}
_SIZED: tuple[Any, ...] = (str, *CONTAINERS)
_DEEP_TESTS = {
    *("in", "lower", "upper", "eq", "==", "equalto", "ne", "!="),
    *("gt", ">", "greaterthan", "ge", ">=", "lt", "<", "lessthan", "le", "<="),
}


# Keyword arguments of a call that the template does not give.
_ADDED_BY_JINJA = ("_loop_vars", "_block_vars")


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with a budget for each render. Templates may be shared by threads."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def __init__(self, filters: Mapping[str, Callable[..., Any]], extensions: list[Any]) -> None:
        # Without optimization nothing that a template says is computed while it is compiled, where there is no budget.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=_shown)
        del self.globals["lipsum"]
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}
        own = {_PAY: _pay, _COPIED: _copied, _MADE: _made, _READ: _read, _CONCAT: _concat, _ADD: _add}
        self.filters = {name: _guarded(name, function) for name, function in {**self.filters, **filters}.items()} | own
        self.tests |= {name: _guarded_test(name, self.tests[name]) for name in _DEEP_TESTS}

    def template(self, source: str) -> jinja2.Template:
        """Compiled, so that it pays. Render it with ``budget()`` among its variables."""
        tree = _Paying().visit(self.parse(source))
        return self.from_string(tree.set_environment(self))

    def budget(self) -> dict[str, Any]:
        """A fresh budget, as the variable that a render finds it in."""
        return {_BUDGET: Budget()}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # These lead to bytes and to tables of them, which prompts have no use for.
        unused = {"encode", "expandtabs", "from_bytes", "fromhex", "maketrans", "to_bytes", "translate"}
        return attr not in unused and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        cost = operator_cost(budget, operator, left, right)
        budget.spend(cost)
        return _checked(budget, self.binop_table[operator](left, right), cost)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a macro, a method or a global."""
        budget = _budget(context)
        subject = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # str.format is wrapped by jinja2
        if isinstance(subject, (str, _Dict)) or isinstance(obj, _Dict):
            args = tuple([list(arg) if isinstance(arg, Iterator) else arg for arg in args])
        named = {name: value for name, value in kwargs.items() if name not in _ADDED_BY_JINJA} if kwargs else kwargs
        budget.spend(STEP + _call_cost(budget, obj, subject, args, named))
        if budget.num_calls == MAX_DEPTH:
            raise TemplateLimitError(f"it nests calls more than {MAX_DEPTH} deep")
        budget.num_calls += 1
        try:
            result = super().call(context, obj, *args, **kwargs)
        finally:
            budget.num_calls -= 1
        return _checked(budget, result) if isinstance(result, (str, dict)) else result


class _Dict:
    """``dict``, without the attributes of a class."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """``namespace``, whose attributes do not begin with an underscore and which does not show them."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace's attribute cannot be named {name!r}")


# -- what the syntax tree is changed to -----------------------------------------------------------------------------------


class _Paying(NodeTransformer):
    """Puts payments where jinja2 asks the environment for nothing."""

    def visit_For(self, node: nodes.For) -> Any:
        if node.test is not None:
            node.test = nodes.And(_payment([node.test], node.lineno), node.test, lineno=node.lineno)
        return self._visit_body(node)

    def _visit_body(self, node: Any) -> Any:
        """What is repeated or called pays each time for its nodes and its text."""
        payment = nodes.ExprStmt(_payment(node.body, node.lineno), lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, payment)
        return node

    visit_Macro = visit_CallBlock = visit_Block = _visit_body

    def visit_List(self, node: Any) -> Any:
        """Literals that hold values; not what is assigned to."""
        self.generic_visit(node)
        is_constant = getattr(node, "ctx", "load") != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        return node if is_constant else _filtered(node, _MADE)

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _COPIED) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno), _CONCAT)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        """A chain of additions at once: it is how most templates put a turn together."""
        operands: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            operands.insert(0, self.visit(left.right))
            left = left.left
        operands.insert(0, self.visit(left))
        return _filtered(nodes.Tuple(operands, "load", lineno=node.lineno), _ADD)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Equality with a constant costs nothing; whether a value is in another, what the test of that name does."""
        self.generic_visit(node)
        first = node.ops[0]
        if len(node.ops) == 1 and first.op in ("in", "notin"):
            test = nodes.Test(node.expr, "in", [first.expr], [], None, None, lineno=node.lineno)
            return test if first.op == "in" else nodes.Not(test, lineno=node.lineno)
        if len(node.ops) > 1 or not isinstance(node.expr, nodes.Const) | isinstance(first.expr, nodes.Const):
            node.expr = _filtered(node.expr, _READ)
            for operand in node.ops:
                operand.expr = _filtered(operand.expr, _READ)
        return node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _payment(body: list[nodes.Node], lineno: int) -> nodes.Filter:
    """For a body's nodes, and for its text as ``_shown`` does."""
    cost = STEP
    for child in body:
        cost += sum(1 for _ in child.find_all(nodes.Node))
        cost += 2 * sum(len(text.data) for text in child.find_all(nodes.TemplateData))
    return _filtered(nodes.Const(cost, lineno=lineno), _PAY)


# -- what is paid when ----------------------------------------------------------------------------------------------------


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[_BUDGET]
    return budget


@pass_context
def _pay(context: Context, cost: int) -> bool:
    _budget(context).spend(cost if cost > STEP else STEP)
    return True


@pass_context
def _shown(context: Context, value: Any) -> Any:
    """What is printed: paid for as itself and as part of the prompt."""
    budget = _budget(context)
    size = len(value) if isinstance(value, str) else budget.measure(value)[0]
    budget.spend((12 if context.eval_ctx.autoescape else 2) * size)
    return value


@pass_context
def _read(context: Context, value: Any) -> Any:
    budget = _budget(context)
    budget.spend(budget.size(value))
    return value


@pass_context
def _copied(context: Context, value: Any) -> Any:
    _budget(context).spend(shallow_size(value))
    return value


@pass_context
def _made(context: Context, value: Any) -> Any:
    return _checked(_budget(context), value)


@pass_context
def _concat(context: Context, parts: tuple[Any, ...]) -> str:
    budget = _budget(context)
    cost = sum([budget.size(part) for part in parts])
    budget.spend(cost)
    joined = (markup_join if context.eval_ctx.autoescape else str_join)(parts)
    _checked(budget, joined, cost)
    return joined


@pass_context
def _add(context: Context, parts: tuple[Any, ...]) -> Any:
    cost = STEP
    for part in parts:
        if type(part) is not str:
            break
        cost += len(part)
    else:
        _budget(context).spend(cost)
        return "".join(parts)
    environment: Any = context.environment
    total = parts[0]
    for part in parts[1:]:
        total = environment.call_binop(context, "+", total, part)
    return total


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for what it reads, for what it makes, and beyond for what it multiplies."""
    if name in _FREE:
        return function
    multiplied, is_lazy, is_gathering = FILTER_COSTS.get(name), name in _LAZY, name in _GATHERING
    needs_context = hasattr(function, "jinja_pass_arg")

    @pass_context
    def guarded(context: Context, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        each, num_items = 8 * STEP if is_gathering else STEP, 1
        if args or kwargs:
            # Each part of a path of attributes is a step, for each item.
            paths = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, str)]
            each += budget.sizes(args, kwargs) + STEP * sum([path.count(".") + path.count(",") for path in paths])
        if is_lazy or is_gathering:
            if not isinstance(value, str) and isinstance(value, Iterator):
                value = list(value) if is_gathering else budget.walk(value, each)
            if isinstance(value, _SIZED):
                num_items = len(value)
        read = shallow_size(value) if is_lazy else budget.size(value)
        budget.spend(read + each * num_items + (multiplied(budget, value, *args, **kwargs) if multiplied else 0))
        result = context.call(function, value, *args, **kwargs) if needs_context else function(value, *args, **kwargs)
        if isinstance(result, str) or not isinstance(result, Iterator):
            return _checked(budget, result)
        return budget.walk(result, each)

    return guarded


def _guarded_test(name: str, test: Any) -> Callable[..., bool]:
    @pass_context
    def guarded(context: Context, value: Any, /, *args: Any) -> bool:
        budget = _budget(context)
        if name == "in" and isinstance(value, str) and args and isinstance(args[0], CONTAINERS):
            # A dict is asked by hash; the items of others are compared with a string, which takes no look inside.
            budget.spend(len(value) + (STEP if isinstance(args[0], dict) else shallow_size(args[0])))
        else:
            budget.spend(budget.size(value) + budget.sizes(args, {}))
        return bool(test(value, *args))

    return guarded


def _checked(budget: Budget, result: Any, paid: int = 0) -> Any:
    """A result that is not too large; what of a string is not ``paid`` for is paid now."""
    if isinstance(result, str):
        if len(result) > paid:
            budget.spend(len(result) - paid)
    elif isinstance(result, CONTAINERS):
        budget.measure(result)
    elif isinstance(result, int):
        check_bits(result.bit_length())
    return result


def _call_cost(budget: Budget, obj: Any, subject: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    if isinstance(obj, Macro):
        if obj.catch_varargs or obj.catch_kwargs:
            budget.measure((*args, *kwargs.values()))
        return 0
    if isinstance(subject, str):
        return method_cost(budget, obj.__name__, subject, args, kwargs)
    if obj is _Namespace or isinstance(obj, _Dict) or isinstance(subject, _Dict):
        return keys_cost(args)
    return budget.sizes(args, kwargs) + (0 if isinstance(subject, dict) else budget.size(subject))

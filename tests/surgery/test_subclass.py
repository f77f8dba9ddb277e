"""Classes that torch.fx wrote a forward for: those of whom they are subclasses notice nothing."""

import abc
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from tests.surgery.test_fuse import assert_back, same, shaken

X = torch.randn(3, 4, 6, 6, dtype=torch.float64)
HEARD: list = []


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Registered(Normalized):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        HEARD.append(cls)


class Required(Normalized):
    def __init_subclass__(cls, *, name, **kwargs):
        HEARD.append((cls, name))


class Final(Normalized):
    def __init_subclass__(cls):
        raise TypeError("no subclasses")


class Telling(type):
    """A metaclass as registries have them."""

    def __new__(mcs, name, bases, content):
        HEARD.append(name)
        return super().__new__(mcs, name, bases, content)

    def __init__(cls, name, bases, content):
        HEARD.append(cls)
        super().__init__(name, bases, content)


class TellingABC(Telling, abc.ABCMeta):
    """One above abc's."""


class Abstract(Normalized, abc.ABC):
    @abc.abstractmethod
    def needed(self): ...


class ByHook(Registered):
    pass


class ByRequired(Required, name="by required"):
    pass


class ByMetaclass(Normalized, metaclass=Telling):
    pass


class ByAbstract(Abstract):
    def needed(self):
        return 1


class ByBoth(Registered, metaclass=TellingABC):
    pass


class Slotted(Normalized):
    __slots__ = ("extra",)


KINDS = [Registered, ByHook, Required, ByRequired, Final, ByMetaclass, ByAbstract, ByBoth, Slotted]


@pytest.mark.parametrize("kind", KINDS)
def test_a_registry_or_a_metaclass_hears_nothing_of_a_rewritten_forward(kind):
    model = shaken(kind())
    heard = list(HEARD)
    fused = bn.from_torch(model, example=X)
    assert fused.batchnorm_report.of("fused") == ["norm"]
    same(model, fused, X)
    for made in (copy.copy(fused), copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fused):
        assert type(made) is not kind
        assert isinstance(made, kind)
        assert (type(made).__name__, type(made).__module__) == (kind.__name__, __name__)
        assert (type(made).__bases__, type(type(made))) == ((kind,), type(kind))
        torch.testing.assert_close(made.eval()(X), model.eval()(X))
    assert_back(model, fused)
    assert fused.norm.eps == 1e-5  # handed back
    assert type(fused) is kind
    assert heard == HEARD


def test_abc_tells_apart_who_is_of_what():
    """Each class has a memory of its own for ``isinstance``, also one that a metaclass was not asked for."""
    model = shaken(ByAbstract())
    fused, child = bn.from_torch(model, example=X), type("Child", (ByAbstract,), {})()
    assert [isinstance(child, type(fused)), isinstance(child, ByAbstract)] == [False, True]
    assert [isinstance(model, type(fused)), isinstance(fused, Abstract)] == [False, True]


def test_a_subclass_of_somebodys_is_told_still():
    fused = bn.from_torch(shaken(ByHook()), example=X)
    made = type("Made", (type(fused),), {})
    assert HEARD[-1] is made


def test_what_the_class_of_a_rewritten_module_makes_has_the_forward_that_there_was():
    fused = bn.from_torch(shaken(ByHook()), example=X)
    torch.manual_seed(0)
    other, expected = type(fused)().double(), None
    torch.manual_seed(0)
    expected = ByHook().double()
    assert type(other) is ByHook
    torch.testing.assert_close(other(X), expected(X))


class SlottedByHook(Registered):
    __slots__ = ("extra",)


def test_a_class_that_takes_no_subclass_in_silence_is_left_alone():
    model, heard = shaken(SlottedByHook()), list(HEARD)
    fused = bn.from_torch(model, example=X)
    assert "its class, SlottedByHook, takes no subclass" in fused.batchnorm_report[0].why
    assert heard == HEARD
    same(model, fused, X)

import pytest
import torch
from torch import nn

from gdn2.modules import linear
from gdn2.modules.linear import OutputLinear, XavierLinear, map_jointly


def test_delta_maps_are_xavier_with_gain_two_to_the_minus_five_halves():
    torch.manual_seed(0)
    linear = XavierLinear(400, 200)
    bound = 2**-2.5 * (6 / 600) ** 0.5
    assert 0.99 * bound < linear.weight.abs().max() <= bound
    assert abs(linear.weight.std() / (bound / 3**0.5) - 1) < 0.02
    assert (linear.bias == 0).all()


def test_output_maps_are_torchs_law_times_a_scale():
    torch.manual_seed(0)
    linear = OutputLinear(400, 200, bias=False)
    assert 0.99 / 20 < linear.weight.abs().max() <= 1 / 20
    linear.reset_parameters(scale=0.1)
    assert 0.099 / 20 < linear.weight.abs().max() <= 0.1 / 20


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def maps() -> list[nn.Module]:
    torch.manual_seed(0)
    plain = XavierLinear(6, 4, bias=False)
    return [plain, nn.Sequential(XavierLinear(6, 2, bias=False), XavierLinear(2, 5))]


def test_maps_are_joined_where_it_pays(monkeypatch):
    """As one product, with the gradients of each."""
    x, results, products = torch.randn(3, 6, requires_grad=True), [], []
    product = linear.F.linear
    monkeypatch.setattr(linear.F, "linear", lambda *a: products.append(a) or product(*a))
    for pays in (False, True):
        monkeypatch.setattr(linear, "_pays", lambda _, pays=pays: pays)
        modules = maps()
        y = torch.cat(map_jointly(modules, x), -1)
        leaves = [x, *(p for m in modules for p in m.parameters())]
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        products.append("end")
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert products.index("end") == 3
    assert len(products) == 3 + 2 + 2  # the joint one, and the second of the sequence


@pytest.mark.parametrize("change", ["replaced", "hooked", "biased", "wrapped"])
def test_what_was_changed_is_called_by_itself(change, monkeypatch):
    monkeypatch.setattr(linear, "_pays", lambda _: True)
    modules = maps()
    if change == "replaced":
        modules[0] = Twice(6, 4, bias=False)
    elif change == "hooked":
        modules[1][0].register_forward_hook(lambda *a: 3 * a[-1])
    elif change == "wrapped":
        plain = modules[0].forward
        modules[0].forward = lambda x: 3 * plain(x)
    else:
        modules[0] = XavierLinear(6, 4)
        nn.init.ones_(modules[0].bias)
    x = torch.randn(3, 6)
    for module, y in zip(modules, map_jointly(modules, x), strict=True):
        assert torch.equal(y, module(x))


def test_few_tokens_are_not_worth_joining():
    assert not linear._pays(torch.zeros(2, linear.JOINT_TOKENS, 1))
    assert not linear._pays(torch.zeros(2, 3, 1, device="meta"))
    assert linear._pays(torch.zeros(2, linear.JOINT_TOKENS // 2, 1, device="meta"))

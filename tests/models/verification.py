"""Shared by the tests of networks: random weights, a copy in stock torch.nn, and comparisons."""

import re

import torch
from torch import nn

from fastseg.testing import assert_within_policy


def randomised(model):
    """Random parameters and running statistics, scaled so that signals keep their size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for values in (layer.weight, layer.running_var):
                    values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
                for values in (layer.bias, layer.running_mean):
                    values.copy_(torch.randn(values.shape, generator=generator) / 4)
            elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                weight = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(weight * (2 / layer.weight[0].numel()) ** 0.5)
                if layer.bias is not None:
                    layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) / 4)
    return model


def by_release_name(model):
    """A function from a parameter's name in the network to its key in the state dict."""
    keys = {id(value): key for key, value in model.state_dict(keep_vars=True).items()}
    own = {name: keys[id(value)] for name, value in model.named_parameters()}
    return own.__getitem__


def copied(stock, model, keys_of_stock):
    """``stock`` with the values of ``model``, and the same parameters trainable."""
    values = model.state_dict(keep_vars=True)
    keys = keys_of_stock(model, stock)
    stock.load_state_dict({key: values[own].detach() for key, own in keys.items()})
    for key, parameter in stock.named_parameters():
        parameter.requires_grad_(values[keys[key]].requires_grad)
    return stock.train(model.training)


def outputs_and_gradients(model, image, grad_output):
    """The output, the gradient of the image, and those of all trained parameters."""
    image = image.clone().requires_grad_()
    output = model(image)
    output.backward(grad_output)
    return output, image.grad, gradients_of(model)


def gradients_of(model):
    """Of all parameters that have one: an auxiliary head has none from the scores alone."""
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def loss_and_gradients(model, loss, image):
    """As `outputs_and_gradients`, of ``loss(image)``."""
    image = image.clone().requires_grad_()
    value = loss(image)
    value.backward()
    return value, image.grad, gradients_of(model)


def assert_vary(results):
    assert results[0].abs().max() > 0.1, "a vanishing output would prove nothing"
    assert results[1].abs().max() > 1e-3, "and so would a vanishing gradient"


def assert_equal_networks(model, stock, exact, image, keys, alike, deep):
    """Output, gradients and running statistics of ``model`` against those of the stock network in fp32 and fp64.

    keys: {key of the stock network: key of the model}.
    """
    shape = (len(image), model.num_classes, *image.shape[2:])
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ours = outputs_and_gradients(model, image, grad_output)
    theirs = outputs_and_gradients(stock, image, grad_output)
    truth = outputs_and_gradients(exact, image.double(), grad_output.double())
    assert_vary(truth)
    assert_close_results(ours, theirs, truth, stock_names(model, ours[2], theirs[2], keys), alike, deep)
    values, stock_values, exact_values = model.state_dict(), stock.state_dict(), exact.state_dict()
    for name, _ in stock.named_buffers():
        if stock_values[name].is_floating_point():
            assert_within_policy(values[keys[name]], stock_values[name], exact_values[name], keys[name])


def stock_names(model, own, stock, keys):
    """{own parameter: stock parameter} of those that have a gradient; they are the same in both networks."""
    by_key = {key: name for name, key in zip(own, map(by_release_name(model), own))}
    names = {by_key[keys[name]]: name for name in stock}
    assert len(names) == len(own) > 0
    return names


def assert_close_results(ours, theirs, truth, names, alike, deep):
    """Compares the results of `outputs_and_gradients` for three networks. names: {own parameter: stock parameter}.

    alike=False: the gradients are compared together, see `Contract.summed_alike`; if `deep`, see `Contract.deep`.
    """
    assert_within_policy(ours[0], theirs[0], truth[0], "output")
    gradients = {"the image": (ours[1], theirs[1], truth[1])}
    gradients |= {name: (ours[2][name], theirs[2][stock], truth[2][stock]) for name, stock in names.items()}
    if alike:
        for name, values in gradients.items():
            assert_within_policy(*values, f"gradient of {name}")
        return
    if deep:
        assert_close_together([*gradients.values()], "gradients")
    else:
        assert_within_policy(*together([*gradients.values()]), "gradient of everything")


def assert_close_together(results, what):
    """``[(ours, stock, exact), ...]`` of deep networks, see `Contract.deep`."""
    ours, stock, exact = together(results)
    for measure, factor in ((torch.linalg.vector_norm, 2), (lambda errors: errors.abs().max(), 4)):
        error, of_stock = measure(ours - exact), measure(stock - exact)
        assert error <= factor * of_stock, f"{what}: error {error:.2e}, stock's {of_stock:.2e}"


def together(results):
    """``[(ours, stock, exact), ...]`` as three long vectors, each result relative to its largest value."""
    scales = [exact.abs().max().item() for _, _, exact in results]
    return [torch.cat([values.flatten() / scale for values, scale in zip(column, scales)]) for column in zip(*results)]


def called_modules(model, image):
    """``[(name, shape of its result), ...]`` of the leaf modules in execution order, by the release's names; without
    ReLUs.
    """
    calls, released, stages = [], model.release_names(), len(getattr(model, "encoder", ()))

    def name_of(path):
        for half, first in (("encoder", 1), ("decoder", -stages)):
            found = re.fullmatch(rf"{half}\.(\d)\.(pool|unpool|dropout)", path)
            if found:
                return found[2].replace("dropout", f"{half[:3]}drop") + str(abs(first + int(found[1])))
        return released.get(path, path)

    def note(name):
        def hook(module, inputs, output):
            values = output[0] if isinstance(output, tuple) else output
            calls.append((name, tuple(values.shape)))

        return hook

    handles = [
        module.register_forward_hook(note(name_of(path)))
        for path, module in model.named_modules()
        if next(module.children(), None) is None and not isinstance(module, (nn.ReLU, nn.Identity))
    ]
    model(image)
    for handle in handles:
        handle.remove()
    return calls

"""What the tests of networks share: random weights, a plain copy, and outputs and gradients side by side."""

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
                inputs = layer.in_channels * layer.weight[0, 0].numel()
                weight = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(weight * (2 / inputs) ** 0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) / 4)
    return model


def copied_in_order(plain, model):
    """``plain`` with the values of ``model``, whose layers it lists in the same order."""
    own, values = plain.state_dict(), model.state_dict().values()
    plain.load_state_dict(dict(zip(own, values, strict=True)))
    return plain.train(model.training)


def outputs_and_gradients(model, image, grad_output):
    image = image.clone().requires_grad_()
    output = model(image)
    output.backward(grad_output)
    return output, image.grad, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equals_plain(model, build_plain, image, same_layouts=True):
    """Output, every gradient and every running statistic of ``model`` within the policy.

    ``build_plain()`` returns the independent build, which takes the weights of ``model`` in order.
    ``same_layouts=False`` says that some of its maps have another memory format, so that stock layers sum in
    another order: the policy is then asked of the gradients of all parameters together, each relative to its
    largest value, as the rounding of a gradient of a few numbers is a matter of luck.
    """
    stock = copied_in_order(build_plain(), model)
    exact = copied_in_order(build_plain(), model).double()
    shape = (len(image), model.num_classes, *image.shape[2:])
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ours = outputs_and_gradients(model, image, grad_output)
    theirs = outputs_and_gradients(stock, image, grad_output)
    truth = outputs_and_gradients(exact, image.double(), grad_output.double())
    assert truth[0].std() > 0.1, "a vanishing output would prove nothing"
    assert truth[1].std() > 1e-3, "and so would a vanishing gradient"
    assert_within_policy(ours[0], theirs[0], truth[0], "output")
    assert_within_policy(ours[1], theirs[1], truth[1], "gradient of the image")
    gradients = list(zip(ours[2].values(), theirs[2].values(), truth[2].values(), strict=True))
    if same_layouts:
        for name, values in zip(ours[2], gradients):
            assert_within_policy(*values, f"gradient of {name}")
    else:
        assert_within_policy(*together(gradients), "all gradients")
    buffers = zip(model.named_buffers(), stock.buffers(), exact.buffers(), strict=True)
    for (name, buffer), stock_buffer, exact_buffer in buffers:
        if buffer.is_floating_point():
            assert_within_policy(buffer, stock_buffer, exact_buffer, name)


def together(gradients):
    """``[(ours, stock, exact), ...]`` as three long vectors, each gradient relative to its largest value."""
    scales = [exact.abs().max().item() for _, _, exact in gradients]
    return [
        torch.cat([values.flatten() / scale for values, scale in zip(column, scales)])
        for column in zip(*gradients)
    ]


def called_modules(model, image):
    """``[(name, shape of what it returned), ...]`` of the leaf modules in the order in which they run."""
    calls = []

    def note(name):
        def hook(module, inputs, output):
            values = output[0] if isinstance(output, tuple) else output
            calls.append((name, tuple(values.shape)))

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    model(image)
    for handle in handles:
        handle.remove()
    return calls

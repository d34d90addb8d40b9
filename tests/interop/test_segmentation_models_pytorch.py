"""Our DeepLab v3, DeepLab v3+, PSPNet and Semantic FPN against segmentation_models_pytorch's: scores and gradients.

The two differ in places. Both are run as they are, on weights that cancel the differences: a layer that only one of
them has is made the identity, and where only an argument of an interpolation differs ours is set to theirs.

* ResNet: the same trunk, without multi-grid. Its last stages are dilated from their first block on, as in our
  `DeepLabV3`; in torchvision's, `DeepLabV3Torchvision`, that block keeps the dilation of the stage before.
* ASPP: the same. In its separable form nothing stands between the depthwise and the 1x1 convolution; in ours
  normalisation and a ReLU do, as in TensorFlow's release.
* DeepLab v3: a 3x3 convolution follows the pyramid, as in torchvision's and not in the paper's; corners are aligned,
  as in the paper's and not in torchvision's.
* DeepLab v3+: one more separable convolution follows the pyramid, and its decoder has one 3x3 block, which is always
  separable, with nothing between the two convolutions; ours has two. Its dilations are 12, 24, 36 at both output
  strides. Running statistics move by 0.1, not 0.0003.
* Xception, that of timm ("tu-xception65" and 71): the same trunk. Its map of stride 4 is taken after the ReLU, ours
  before it, as in TensorFlow's release.
* PSPNet: its trunk has torchvision's stem and ends with the second stage, of stride 8, so that nothing is dilated. Its
  pyramid differs in the order of the channels, and the coarsest map has a bias instead of normalisation. A 1x1
  convolution and 3x3 scores follow, in ours a 3x3 convolution and 1x1 scores, as in semseg.
* FPN: its pyramid has no 3x3 convolutions after the sums, corners are aligned in all bilinear interpolations, and
  channels are dropped before the scores.
* U-Net: another network, a ResNet with a decoder that repeats pixels and has no skip of full size. Not compared.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg.models import DeepLabV3, DeepLabV3Plus, DeepLabV3PlusXception, DeepLabV3Torchvision, PSPNet, SemanticFPN
from fastseg.models.blocks.xception import Unit
from fastseg.models.deeplab_v3 import BATCH_NORM_MOMENTUM
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES
from tests.models.verification import assert_close_together, randomised

smp = pytest.importorskip("segmentation_models_pytorch")
deeplab = pytest.importorskip("segmentation_models_pytorch.decoders.deeplabv3.decoder")
psp = pytest.importorskip("segmentation_models_pytorch.decoders.pspnet.decoder")
base = pytest.importorskip("segmentation_models_pytorch.base")

in_both_modes = pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))


def seeded(make, *shape, seed=1):
    return make(*shape, generator=torch.Generator().manual_seed(seed))


def tensors_of(module):
    """Parameters and running statistics."""
    return {
        name: value
        for name, value in (*module.named_parameters(), *module.named_buffers())
        if not name.endswith("num_batches_tracked")
    }


def paired(ours, theirs, rules, without=()):
    """{own tensor: theirs} by the first rule (pattern, replacement) that fits; of None, only ours has the layer.

    without: the layers that only theirs has.
    """
    names = {}
    for name in tensors_of(ours):
        pattern, replacement = next(rule for rule in rules if re.match(rule[0], name))
        if replacement is not None:
            names[name] = re.sub(pattern, replacement, name, count=1)
    surplus = {*tensors_of(theirs)} - {*names.values()}
    assert {name.rpartition(".")[0] for name in surplus} == {*without}
    return names


@torch.no_grad()
def make_identity_(*modules):
    """Convolutions give each channel back, normalisations everything: with ReLUs among them, of maps without negative
    values. Call it after `train`, which normalisations do not follow any more.
    """
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.dirac_(layer.weight, layer.groups)
                if layer.bias is not None:
                    layer.bias.zero_()
            elif isinstance(layer, nn.BatchNorm2d):
                for values, value in ((layer.weight, 1), (layer.bias, 0), (layer.running_mean, 0)):
                    values.fill_(value)
                layer.running_var.fill_(1)
                layer.eps = 0.0
                layer.eval()


def results_of(network, run, inputs, backward=True):
    """Outputs, and by name the gradients of inputs and parameters."""
    leaves = {f"input {place}": value.clone().requires_grad_() for place, value in enumerate(inputs)}
    outputs = run(network, *leaves.values())
    if backward:
        torch.autograd.backward(outputs, [seeded(torch.randn, *output.shape, seed=2).to(output) for output in outputs])
    leaves |= network.named_parameters()
    return [output.detach() for output in outputs], {name: value.grad for name, value in leaves.items()}


def assert_agree(ours, theirs, names, run, run_theirs, *inputs, gradients_in_fp32=True):
    """Outputs, gradients and running statistics agree, in the mode that the networks are in; theirs gets our values.

    names: {own tensor: theirs}. run: (network, *inputs) to a tuple of outputs.

    In fp64 all gradients are equal. In fp32 they are held to the policy, but not those of wide networks: of a million
    ReLUs one has an input so near to 0 that its rounding, in one of the networks, decides about the gradients.
    """
    with torch.no_grad():
        own, other = tensors_of(ours), tensors_of(theirs)
        for name, their_name in names.items():
            assert own[name].shape == other[their_name].shape, name
            other[their_name].copy_(own[name])
    precise, exact = (copy.deepcopy(network).double() for network in (ours, theirs))
    doubles = [value.double() for value in inputs]
    found, gradients = results_of(ours, run, inputs, gradients_in_fp32)
    stock, stock_gradients = results_of(theirs, run_theirs, inputs, gradients_in_fp32)
    _, precise_gradients = results_of(precise, run, doubles)
    truth, exact_gradients = results_of(exact, run_theirs, doubles)

    assert all(values.abs().max() > 0.1 for values in truth), "a vanishing output would prove nothing"
    for values in zip(found, stock, truth, strict=True):
        assert_within_policy(*values, "output")
    if not ours.training:
        with torch.no_grad():  # ASPP then folds normalisation into convolutions
            for values in zip(run(ours, *inputs), stock, truth, strict=True):
                assert_within_policy(*values, "output without gradients")
    trained = {name: name for name in gradients if name.startswith("input ")}
    trained |= {name: their_name for name, their_name in names.items() if name in gradients}
    assert all(exact_gradients[their_name].abs().max() > 1e-6 for their_name in trained.values())
    for name, their_name in trained.items():
        scale = exact_gradients[their_name].abs().max()
        assert (precise_gradients[name] - exact_gradients[their_name]).abs().max() < 1e-8 * scale, name
    if gradients_in_fp32:
        triples = [
            (gradients[name], stock_gradients[their_name], exact_gradients[their_name])
            for name, their_name in trained.items()
        ]
        assert_close_together(triples, "gradients")
    own, other, truth = (tensors_of(network) for network in (ours, theirs, exact))
    for name, their_name in names.items():
        if "running" in name:
            assert_within_policy(own[name], other[their_name], truth[their_name], name)


def whole(network, image):
    return (network(image),)


@in_both_modes
def test_pyramid_and_head_of_deeplab_v3(training):
    ours = randomised(DeepLabV3Torchvision(CLASSES, width_multiplier=1 / 16, dropout=0.0).classifier).train(training)
    decoder = deeplab.DeepLabV3Decoder(128, 16, (12, 24, 36), aspp_separable=False, aspp_dropout=0.0)
    theirs = nn.ModuleList([decoder, base.SegmentationHead(16, CLASSES, kernel_size=1)]).train(training)
    rules = [(r"0\.", "0.aspp."), (r"1\.", "0.conv."), (r"2\.", "0.bn."), (r"4\.", "1.0.")]
    names = paired(ours, theirs, rules)
    maps = seeded(torch.randn, 2, 128, 29, 40)
    assert_agree(ours, theirs, names, whole, lambda network, maps: (network[1](network[0]([maps])),), maps)


def test_deeplab_v3():
    """The whole network of the paper at output stride 8."""
    ours = randomised(DeepLabV3(CLASSES, layers=50, output_stride=8, multi_grid=(1, 1, 1))).eval()
    theirs = smp.DeepLabV3("resnet50", encoder_weights=None, encoder_output_stride=8, classes=CLASSES).eval()
    make_identity_(theirs.decoder.conv, theirs.decoder.bn)
    rules = [(r"backbone\.", "encoder."), (r"aspp\.", "decoder.aspp."), (r"classifier\.", "segmentation_head.0.")]
    names = paired(ours, theirs, rules, without=["decoder.conv", "decoder.bn"])
    assert_agree(ours, theirs, names, whole, whole, seeded(torch.randn, 1, 3, 48, 64), gradients_in_fp32=False)


AFTER_ASPP = ("decoder.aspp.1.0", "decoder.aspp.1.1", "decoder.aspp.2")
DECODER_RULES = [
    (r"decoder\.reduction\.", "decoder.block1."),
    (r"decoder\.classifier\.", "segmentation_head.0."),
    (r"decoder\.second\.", None),
]


def test_deeplab_v3_plus():
    """The whole network on ResNet at output stride 16; our 3x3 convolution is the product of their separable one.

    Its depthwise weights are powers of 2, so that the products are exact.
    """
    ours = randomised(DeepLabV3Plus(CLASSES, layers=50, multi_grid=(1, 1, 1))).eval()
    options = dict(decoder_atrous_rates=(6, 12, 18), decoder_aspp_separable=False, classes=CLASSES)
    theirs = randomised(smp.DeepLabV3Plus("resnet50", encoder_weights=None, **options)).eval()
    make_identity_(ours.decoder.second, theirs.decoder.aspp[1:])
    depthwise, pointwise = theirs.decoder.block2[0]
    with torch.no_grad():
        depthwise.weight.copy_(depthwise.weight.sign() * depthwise.weight.abs().log2().round().exp2())
        ours.decoder.first[0].weight.copy_(pointwise.weight * depthwise.weight.transpose(0, 1))
    rules = [
        *DECODER_RULES,
        (r"backbone\.", "encoder."),
        (r"aspp\.", "decoder.aspp.0."),
        (r"decoder\.first\.0\.", None),
        (r"decoder\.first\.", "decoder.block2."),
    ]
    names = paired(ours, theirs, rules, without=[*AFTER_ASPP, "decoder.block2.0.0", "decoder.block2.0.1"])
    assert_agree(ours, theirs, names, whole, whole, seeded(torch.randn, 1, 3, 48, 64), gradients_in_fp32=False)


@in_both_modes
def test_separable_pyramid_and_decoder_of_deeplab_v3_plus(training):
    """On maps and with depthwise weights above 0, so that the ReLU between the two convolutions changes nothing."""
    ours = DeepLabV3PlusXception(CLASSES, layers=41, dropout=0.0)
    ours.backbone = nn.Identity()
    randomised(ours).train(training)
    channels = (3, 64, 256, 728, 1024, 2048)
    options = dict(atrous_rates=(6, 12, 18), output_stride=16, aspp_separable=True, aspp_dropout=0.0)
    theirs = nn.ModuleDict(
        dict(
            decoder=deeplab.DeepLabV3PlusDecoder(channels, 5, 256, **options),
            segmentation_head=base.SegmentationHead(256, CLASSES, kernel_size=1),
        )
    ).train(training)
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = BATCH_NORM_MOMENTUM
    separable = [*ours.aspp.convs[1:4], ours.decoder.first]
    make_identity_(ours.decoder.second, theirs["decoder"].aspp[1:], *(block[1] for block in separable))
    with torch.no_grad():
        for block in separable:
            block[0].weight.abs_()
    rules = [
        *DECODER_RULES,
        (r"aspp\.convs\.[123]\.1\.|decoder\.first\.1\.", None),
        (r"aspp\.convs\.([123])\.0\.", r"decoder.aspp.0.convs.\1.0.0."),
        (r"aspp\.convs\.([123])\.3\.", r"decoder.aspp.0.convs.\1.0.1."),
        (r"aspp\.convs\.([123])\.4\.", r"decoder.aspp.0.convs.\1.1."),
        (r"aspp\.", "decoder.aspp.0."),
        (r"decoder\.first\.0\.", "decoder.block2.0.0."),
        (r"decoder\.first\.3\.", "decoder.block2.0.1."),
        (r"decoder\.first\.4\.", "decoder.block2.1."),
    ]
    names = paired(ours, theirs, rules, without=AFTER_ASPP)

    def run(network, last, low_level):
        return network.score_maps((low_level, last))

    def run_theirs(network, last, low_level):
        return (network["segmentation_head"](network["decoder"]([None, None, low_level, None, None, last])),)

    last, low_level = seeded(torch.rand, 2, 2048, 5, 7) + 0.1, seeded(torch.randn, 2, 256, 20, 28)
    assert_agree(ours, theirs, names, run, run_theirs, last, low_level, gradients_in_fp32=False)


@pytest.mark.parametrize("layers", (65, 71))
def test_xception(layers):
    ours = randomised(DeepLabV3PlusXception(layers=layers).backbone).eval()
    for unit in ours.children():
        if isinstance(unit, Unit):
            unit.rep[-1].weight.data *= 0.3  # else the sums of 20 units grow to 10^9, and rounding with them
    theirs = smp.encoders.get_encoder(f"tu-xception{layers}", weights=None, output_stride=16).eval()

    def run(network, image):
        low_level, last = network(image)
        return last, F.relu(low_level)

    def run_theirs(network, image):
        _, _, low_level, *_, last = network(image)
        return last, low_level

    image = seeded(torch.randn, 1, 3, 48, 64)
    layers_called = [calls_of(network, image) for network in (ours, theirs)]
    names = {
        f"{own}.{name}": f"{other}.{name}"
        for own, other in zip(*layers_called, strict=True)
        for name in tensors_of(ours.get_submodule(own))
    }
    assert {*names} == {*tensors_of(ours)} and {*names.values()} == {*tensors_of(theirs)}
    assert_agree(ours, theirs, names, run, run_theirs, image, gradients_in_fp32=False)


@torch.no_grad()
def calls_of(network, image):
    """The names of the convolutions and normalisations in the order in which they run."""
    calls, handles = [], []
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            handles.append(layer.register_forward_hook(lambda *_, name=name: calls.append(name)))
    network(image)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize(
    "kernel_size, training", ((1, False), (3, False), (3, True)), ids=("1x1-eval", "3x3-eval", "3x3-train")
)
def test_pyramid_pooling(kernel_size, training):
    """PSPNet's head on a map, up to the class scores, with the convolution of theirs and with that of ours.

    After 1x1 normalisation in training would take away the bias of the coarsest map: nothing to compare.
    """
    ours = PSPNet(CLASSES, width_multiplier=1 / 64, dropout=0.0, auxiliary=False)
    ours.backbone = nn.Identity()
    padding = kernel_size // 2
    ours.cls[0] = nn.Conv2d(64, 8, kernel_size, padding=padding, bias=False)
    randomised(ours).train(training)
    decoder = psp.PSPDecoder((32,), out_channels=8, dropout=0.0)
    decoder.conv = base.modules.Conv2dReLU(64, 8, kernel_size, padding)
    decoder.psp.register_forward_hook(lambda module, inputs, joined: joined.roll(32, 1))  # the map first, as in ours
    theirs = nn.ModuleDict(dict(decoder=decoder, segmentation_head=base.SegmentationHead(8, CLASSES, kernel_size=1)))
    theirs.train(training)
    make_identity_(ours.ppm.features[0][2])
    ours.ppm.features[0][2].bias.data = seeded(torch.randn, 8) / 4
    rules = [
        (r"ppm\.features\.0\.2\.bias", "decoder.psp.blocks.0.pool.1.0.bias"),
        (r"ppm\.features\.0\.2\.", None),
        (r"ppm\.features\.(\d)\.1\.", r"decoder.psp.blocks.\1.pool.1.0."),
        (r"ppm\.features\.(\d)\.2\.", r"decoder.psp.blocks.\1.pool.1.1."),
        (r"cls\.0\.", "decoder.conv.0."),
        (r"cls\.1\.", "decoder.conv.1."),
        (r"cls\.4\.", "segmentation_head.0."),
    ]
    names = paired(ours, theirs, rules)
    assert_agree(
        ours,
        theirs,
        names,
        lambda network, maps: network.score_maps((None, None, None, maps)),
        lambda network, maps: (network["segmentation_head"](network["decoder"]([maps])),),
        seeded(torch.randn, 2, 32, 11, 17),
    )


def test_semantic_fpn():
    """The whole network."""
    ours = randomised(SemanticFPN(CLASSES, layers=50, stride_in_1x1=False)).eval()
    make_identity_(*(ours.backbone.get_submodule(f"fpn_output{level}") for level in (2, 3, 4, 5)))
    ours.align_corners = True
    for layer in ours.modules():
        if isinstance(layer, nn.Upsample):
            layer.align_corners = True
    theirs = smp.FPN("resnet50", encoder_weights=None, classes=CLASSES).eval()
    rules = [
        (r"backbone\.bottom_up\.", "encoder."),
        (r"backbone\.fpn_lateral5\.", "decoder.p5."),
        (r"backbone\.fpn_lateral(\d)\.", r"decoder.p\1.skip_conv."),
        (r"backbone\.fpn_output", None),
        (r"sem_seg_head\.predictor\.", "segmentation_head.0."),
    ]
    for level in (2, 3, 4, 5):
        for place in range(max(1, level - 2)):
            own, other = rf"sem_seg_head\.p{level}\.{2 * place}", f"decoder.seg_blocks.{5 - level}.block.{place}.block"
            rules += [(rf"{own}\.layer\.", f"{other}.0."), (rf"{own}\.norm\.", f"{other}.1.")]
    names = paired(ours, theirs, rules)
    assert_agree(ours, theirs, names, whole, whole, seeded(torch.randn, 1, 3, 64, 96), gradients_in_fp32=False)

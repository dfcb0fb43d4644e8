"The backbones, against torchvision's, timm's and nets written out by hand, and with real weights where they are at hand."

import os
import re
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from few import PAIR, few
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from mlan.backbones import (BACKBONES, STYLES, ResNetExtractor, TimmExtractor, VGGExtractor, backbone_name,
                            build_extractor)
from mlan.label_spaces import CITYSCAPES, shared_classes
from mlan.layouts import camvid
from mlan.networks import Extractor, Normalise, Segmenter, SmallExtractor, freeze_batch_norm
from mlan.run_folder import load_segmenter, save_segmenter
from mlan.settings import make_settings
from mlan.train import adapt

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
DILATED = dict(output_stride=8)
CAFFE_MEAN = torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)


def weights_file(name: str) -> str:
    "A file of real weights in the folder that MLAN_WEIGHTS names."
    if not os.environ.get("MLAN_WEIGHTS"):
        pytest.skip("MLAN_WEIGHTS is not set: let it name the folder that holds the weights")
    return str(Path(os.environ["MLAN_WEIGHTS"]) / name)


def with_history(net: nn.Module) -> nn.Module:
    "BatchNorm as if trained: no two channels alike, and maps that neither grow nor vanish with depth."
    for name, layer in net.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.1, 0.4) if name.endswith("bn3") else nn.init.uniform_(layer.weight, 0.7, 1.3)
            for numbers in (layer.bias, layer.running_mean):
                nn.init.normal_(numbers, std=0.1)
            nn.init.uniform_(layer.running_var, 0.7, 1.3)
    return net.eval()


def caffe_state(name: str = "resnet50") -> dict:
    "A random ResNet under torchvision's names whose first BatchNorm has seen 0 to 255."
    state = with_history(getattr(torchvision.models, name)()).state_dict()
    state["bn1.running_var"] *= 5000
    return state


# ------------------------------------------------------------------------------------------------ arrangements

@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_torchvision_style_equals_the_backbone_of_torchvisions_deeplab(name):
    oracle = getattr(torchvision.models.segmentation, f"deeplabv3_{name}")(weights=None, weights_backbone=None).backbone
    net = ResNetExtractor(name)
    net.body.load_state_dict(with_history(oracle).state_dict())
    image = torch.rand(1, 3, 65, 97)
    means, deviations = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert_close(net.eval()(image), oracle((image - means) / deviations)["out"])


def norm_by_hand(x, state, name):
    numbers = [state[f"{name}.{n}"].view(1, -1, 1, 1) for n in ("running_mean", "running_var", "weight", "bias")]
    mean, variance, scale, shift = numbers
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def bottleneck_by_hand(x, state, name, stride, rate):
    "DeepLab-V2's block: stride in the first 1 x 1, one dilation for every block of a stage."
    y = norm_by_hand(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride), state, f"{name}.bn1").relu()
    y = norm_by_hand(F.conv2d(y, state[f"{name}.conv2.weight"], padding=rate, dilation=rate), state, f"{name}.bn2").relu()
    y = norm_by_hand(F.conv2d(y, state[f"{name}.conv3.weight"]), state, f"{name}.bn3")
    if f"{name}.downsample.0.weight" in state:
        x = norm_by_hand(F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride), state, f"{name}.downsample.1")
    return (x + y).relu()


def resnet_by_hand(image, state, blocks, mean):
    x = image[:, [2, 1, 0]] * 255 - mean
    x = norm_by_hand(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), state, "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for i, (n, stride, rate) in enumerate(zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4)), 1):
        for j in range(n):
            x = bottleneck_by_hand(x, state, f"layer{i}.{j}", stride if j == 0 else 1, rate)
    return x


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_caffe_style_equals_a_net_written_out_by_hand(name):
    net = ResNetExtractor(name, "caffe")
    state = caffe_state(name)
    net.body.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    image = torch.rand(1, 3, 65, 97)
    expected = resnet_by_hand(image, state, BLOCKS[name], CAFFE_MEAN)
    assert expected.std() > 0.1
    assert_close(net.eval()(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resnets_levels_are_those_of_torchvisions_layer3_and_layer4(checkpointing):
    plain = with_history(torchvision.models.resnet50(replace_stride_with_dilation=(False, True, True)))
    oracle = torchvision.models._utils.IntermediateLayerGetter(plain, {"layer3": "middle", "layer4": "features"})
    net = freeze_batch_norm(ResNetExtractor("resnet50", checkpointing=checkpointing).train())
    net.body.load_state_dict(oracle.state_dict())
    image = torch.rand(2, 3, 65, 97)
    middle, features = net.levels(image)
    expected = oracle(net.normalise(image))
    assert (middle.shape[1], features.shape[1]) == (net.middle_channels, net.channels)
    assert_close(middle, expected["middle"])
    assert_close(features, expected["features"])
    middle.square().mean().backward()                                          # a head on the middle moves no layer after it
    assert net.body.layer3[0].conv1.weight.grad.abs().sum() > 0 and net.body.layer4[0].conv1.weight.grad is None


@torch.no_grad()
def test_rounding_up_in_the_pooling_changes_only_the_far_border():
    net = ResNetExtractor("resnet50", "deeplab")
    with_history(net)
    image = torch.rand(1, 3, 256, 512)
    ours = net(image)
    net.body.maxpool.ceil_mode = True           # as in the code of [26, 30]
    theirs = net(image)
    assert (ours.shape[-2:], theirs.shape[-2:]) == ((32, 64), (33, 65))
    reach = 3 * 4 + 6 * 2 + 4 * 1 + 2           # 3 x 3 kernels of layer4, layer3, layer2 and layer1, in features
    assert_close(theirs[..., :32 - reach, :64 - reach], ours[..., :32 - reach, :64 - reach], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs[..., :32, :64], ours, atol=1e-3)


@torch.no_grad()
def test_vgg_equals_torchvisions_up_to_conv4_3_and_a_net_written_out_by_hand_after_it():
    plain, net, image = torchvision.models.vgg16().features, VGGExtractor(), torch.rand(2, 3, 60, 81)
    for layer in plain:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias, std=0.1)
    net.features.load_state_dict(plain.state_dict())
    x = plain[:23](net.normalise(image))                                       # conv4_3 and its ReLU
    assert torch.equal(net.features[:23](net.normalise(image)), x)
    for i in (24, 26, 28):
        x = F.conv2d(x, plain[i].weight, plain[i].bias, padding=2, dilation=2).relu()
    for fc in (net.fc6, net.fc7):
        x = F.conv2d(x, fc.weight, fc.bias, padding=4, dilation=4).relu()
    assert x.shape == (2, 1024, 7, 10)
    assert_close(net(image), x)
    assert net.levels(image)[0] is None and net.middle_channels is None


def test_random_weights_are_drawn_in_torchvisions_order():
    def same(ours, theirs):
        return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    torch.manual_seed(1)
    ours = [build_extractor("vgg16"), torch.rand(3), build_extractor("resnet50", style="caffe")]
    torch.manual_seed(1)
    vgg = torchvision.models.vgg16().features
    fc = [nn.Conv2d(512, 1024, 3), nn.Conv2d(1024, 1024, 3)]
    assert same(ours[0].parameters(), [p for m in (vgg, *fc) for p in m.parameters()]) and torch.equal(ours[1], torch.rand(3))
    assert same(ours[2].parameters(), [p for k, p in torchvision.models.resnet50().named_parameters() if not k.startswith("fc.")])


@pytest.mark.parametrize("backbone, rounds", [("resnet50", "up"), ("resnet101", "up"), ("vgg16", "down")])
def test_output_stride_is_eight_at_the_papers_sizes_and_at_odd_ones(backbone, rounds):
    with torch.device("meta"):
        nets = [build_extractor(backbone, style=style) for style in STYLES]
    for height, width in [(720, 1280), (760, 1280), (512, 1024), (1024, 2048), (65, 127)]:
        up = (-(-height // 8), -(-width // 8))
        expected = up if rounds == "up" else (height // 8, width // 8)
        for net in nets:
            assert net(torch.empty(1, 3, height, width, device="meta")).shape == (1, net.channels, *expected)


# ------------------------------------------------------------------------------------------------ weights

def published(state: dict, kind: str) -> dict:
    "A state dict as the world has it."
    heads = {f"layer5.conv2d_list.{i}.{n}": torch.zeros(21, 1) for i in range(4) for n in ("weight", "bias")}
    body = {k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    if kind == "DeepLab_resnet_pretrained":
        return {f"Scale.{k}": v for k, v in {**body, **heads}.items()}
    if kind == "AdaptSegNet":
        return {**body, **heads, "layer6.conv2d_list.0.weight": torch.zeros(19, 1)}
    return {f"module.{k}": v for k, v in {**body, **heads}.items()}


@pytest.mark.parametrize("kind", ["DeepLab_resnet_pretrained", "AdaptSegNet", "of several GPUs"])
@torch.no_grad()
def test_deeplabs_published_names_bring_their_arrangement_and_mean(kind, tmp_path):
    state, path = caffe_state(), str(tmp_path / "file.pth")
    torch.save(published(state, kind), path)
    net = build_extractor("resnet50", path).eval()
    assert net.style == "deeplab"
    image = torch.rand(1, 3, 40, 48)
    mean = torch.tensor([104.00698793, 116.66876762, 122.67891434]).view(1, 3, 1, 1)
    assert_close(net(image), resnet_by_hand(image, state, BLOCKS["resnet50"], mean), rtol=1e-4, atol=1e-4)


def test_a_style_that_contradicts_the_file_is_refused(tmp_path):
    files = {"caffe": str(tmp_path / "a.pth"), "torchvision": str(tmp_path / "caffe_by_name_alone.pth")}
    torch.save(caffe_state(), files["caffe"])
    torch.save(with_history(torchvision.models.resnet50()).state_dict(), files["torchvision"])
    for style, path in files.items():
        assert build_extractor("resnet50", path).style == style
        assert build_extractor("resnet50", f"{style}:{path}").style == style
        other = "torchvision" if style == "caffe" else "caffe"
        for wrong in (dict(weights=f"{other}:{path}"), dict(weights=path, style=other)):
            with pytest.raises(ValueError, match=f"taken as {other}'s.*; write {style}:{path}"):
                build_extractor("resnet50", **wrong)


def test_files_that_do_not_fit_are_refused_by_name(tmp_path):
    path = tmp_path / "half.pth"
    state = with_history(torchvision.models.resnet50()).state_dict()
    for broken in ({k: v for k, v in state.items() if k != "layer4.1.conv2.weight"}, {**state, "extra": torch.zeros(1)},
                   {**state, "layer1.0.conv1.weight": torch.zeros(1)}, {"state_dict": state}, [1, 2]):
        torch.save(broken, path)
        with pytest.raises(ValueError, match="half.pth (does not fit this backbone|is no file of named tensors)"):
            build_extractor("resnet50", str(path))
    for name in ("half.pth", "half.safetensors"):
        (tmp_path / name).write_bytes(b"torn bytes")
        with pytest.raises(ValueError, match=f"{name} is no file of named tensors"):
            build_extractor("resnet50", str(tmp_path / name))


def offline(*args, **kwargs):
    "In the place of what fetches."
    raise urllib.error.URLError("Name or service not known")


def test_weights_that_cannot_be_fetched_are_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", offline)
    with pytest.raises(ValueError, match=r"resnet50 cannot be fetched .*resnet50-.*\.pth elsewhere and give the file as weights"):
        build_extractor("resnet50", "imagenet")


def test_imagenet_takes_torchvisions_first_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    state = with_history(torchvision.models.resnet50()).state_dict()
    torch.save(state, tmp_path / "hub/checkpoints/resnet50-0676ba61.pth")       # IMAGENET1K_V1, as if downloaded
    net = build_extractor("resnet50", "imagenet")
    assert net.style == "torchvision" and torch.equal(net.body.conv1.weight, state["conv1.weight"])


def test_scales_of_loaded_batch_norm_are_not_trained_and_all_else_is(tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save(caffe_state(), path)
    net = freeze_batch_norm(build_extractor("resnet50", path).train())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.rand(1, 3, 40, 40)).square().mean().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    norms = {k for k, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, value in net.state_dict().items():
        assert torch.equal(before[name], value) == (name.rsplit(".", 1)[0] in norms), name
    assert all(p.requires_grad for p in build_extractor("resnet50").parameters())    # random weights: nothing to keep


# ------------------------------------------------------------------------------------------------ torchvision's and timm's

def file_of(net: nn.Module, path: Path, without=(), half=True) -> str:
    "A whole network's tensors, as they might be published."
    state = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith(without)}
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


def rounded(net: nn.Module) -> nn.Module:
    "With the weights that half precision leaves."
    net.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in with_history(net).state_dict().items()})
    return net.eval()


@pytest.mark.parametrize("name, middle, end", [  # how many children of .features come before the middle, and before the features
    ("mobilenet_v2", 6, 7), ("mobilenet_v3_small", 3, 4), ("densenet121", 6, 7), ("convnext_tiny", 3, 4), ("efficientnet_b0", 3, 4),
    ("squeezenet1_1", 7, 8), ("vgg11_bn", 18, 21)])
def test_torchvisions_chains_are_cut_at_stride_eight(name, middle, end, tmp_path):
    whole = rounded(torchvision.models.get_model(name))
    deeper = tuple(f"features.{k}." for k, _ in list(whole.features.named_children())[end:])
    path = file_of(whole, tmp_path / "a.safetensors", without=("classifier.", *deeper))
    net = build_extractor(f"torchvision:{name}", path).eval()
    image = torch.rand(2, 3, 96, 160)
    with torch.no_grad():
        levels = net.levels(image)
        x = net.normalise(image)
        for i, child in enumerate(whole.features[:end]):
            if i == middle:
                assert_close(levels[0], x)
            x = child(x)
    assert_close(levels[1], x)
    assert [m.shape[1] for m in levels] == [net.middle_channels, net.channels]
    assert net.stride == 8 and 11 <= x.shape[2] <= 12 and whole.features[end](x).shape[2] <= 6
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert_close(net.normalise(image), (image - mean) / std)


def test_an_activation_in_place_does_not_reach_the_middle():
    net = build_extractor("torchvision:vgg11_bn").train()
    middle, features = net.levels(torch.rand(2, 3, 64, 64))
    before = middle.detach().clone()
    net.body[1](middle)
    assert torch.equal(middle, before)
    (features.sum() + middle.sum()).backward()


@pytest.mark.parametrize("kind, name, frozen, random", [
    ("torchvision", "mobilenet_v3_small", "body.0.0.1.weight", "body.0.0.0.weight"),
    ("timm", "tf_efficientnet_lite0@3", "body.bn1.bias", "body.conv_stem.weight")])
def test_their_batch_norm_stays_as_loaded_and_its_scales_are_frozen(kind, name, frozen, random, tmp_path):
    if kind == "timm":
        pytest.importorskip("timm")
    fresh = build_extractor(f"{kind}:{name}")
    assert all(m.training for m in fresh.modules()) and all(p.requires_grad for p in fresh.parameters())
    assert all(v == 0 for k, v in fresh.named_buffers() if k.endswith("num_batches_tracked"))       # the try-out was not counted
    create = torchvision.models.get_model if kind == "torchvision" else sys.modules["timm"].create_model
    published = with_history(create(name.split("@")[0]))
    net = build_extractor(f"{kind}:{name}", file_of(published, tmp_path / "a.pt", half=False))
    norms = {k for k, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    held = {k for k, p in net.named_parameters() if not p.requires_grad}
    assert held == {f"{k}.{n}" for k in norms for n in ("weight", "bias")} and frozen in held and random not in held
    numbers = torch.cat([v.flatten() for k, v in net.named_buffers() if k.endswith("running_var")])
    assert 0.7 <= numbers.min() < numbers.max() <= 1.3 and net.training         # those of the file, none moved by a pass


def test_densenets_published_names_are_understood(tmp_path):
    whole = with_history(torchvision.models.densenet121())
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in whole.state_dict().items()}
    assert set(old) != set(whole.state_dict())
    torch.save(old, tmp_path / "densenet121-a639ec97.pth")
    net = build_extractor("torchvision:densenet121", str(tmp_path / "densenet121-a639ec97.pth"))
    assert torch.equal(net.body[0].denseblock1.denselayer1.norm1.weight, whole.features.denseblock1.denselayer1.norm1.weight)


def test_files_of_libraries_that_do_not_fit_are_refused_by_name(tmp_path):
    whole, path = torchvision.models.mobilenet_v3_small(), tmp_path / "a.pt"
    state, name = whole.state_dict(), "torchvision:mobilenet_v3_small"
    without = {k: v for k, v in state.items() if k != "features.2.block.0.0.weight"}
    for broken, told in ((without, r"missing \['features.2.block.0.0.weight'\]"),
                         ({**state, "extra": torch.zeros(1)}, r"unexpected \['extra'\]"),
                         ({**state, "features.0.0.weight": torch.zeros(1)}, r"unexpected \['features.0.0.weight'\]")):
        torch.save(broken, path)
        with pytest.raises(ValueError, match=f"a.pt does not fit this backbone; .*{told}"):
            build_extractor(name, str(path))
    torch.save({**state, "classifier.3.weight": torch.zeros(7, 1024)}, path)                       # fine-tuned for other classes
    build_extractor(name, str(path))
    for wrong in (dict(weights=f"caffe:{path}"), dict(weights=str(path), style="caffe")):
        with pytest.raises(ValueError, match="torchvision's own normalisation; give .*a.pt without the style caffe"):
            build_extractor(name, **wrong)
    with pytest.raises(FileNotFoundError, match="there is no file nowhere.pt"):
        build_extractor(name, "nowhere.pt")


def test_imagenet_takes_torchvisions_first_weights_of_a_chain(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    state = with_history(torchvision.models.mobilenet_v2()).state_dict()
    torch.save(state, tmp_path / "hub/checkpoints/mobilenet_v2-b0353104.pth")                     # IMAGENET1K_V1, as if downloaded
    net = build_extractor("torchvision:mobilenet_v2", "imagenet")
    assert torch.equal(net.body[0][0][0].weight, state["features.0.0.weight"]) and not net.body[0][0][1].weight.requires_grad
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"mobilenet_v2 cannot be fetched .*mobilenet_v2-b0353104\.pth elsewhere and give the file"):
        build_extractor("torchvision:mobilenet_v2", "imagenet")


@pytest.mark.parametrize("name, told", [("resnet18", "torchvision's resnet18 has no chain .features"),
                                        ("vit_b_16", "has no chain .features"),
                                        ("swin_t", "has no chain .features whose maps"),          # (B, h, w, channels)
                                        ("fasterrcnn_resnet50_fpn", "has no classifier fasterrcnn"),
                                        ("mobilenet", "has no classifier mobilenet;")])
def test_torchvisions_models_that_have_no_chain_are_refused(name, told):
    with pytest.raises(ValueError, match=told):
        build_extractor(f"torchvision:{name}")


def hooked(whole: nn.Module, image, *modules) -> list:
    "What modules of a whole network put out."
    seen = []
    for name in modules:
        whole.get_submodule(name).register_forward_hook(lambda _, inputs, out: seen.append(out))
    with torch.no_grad():
        whole(image)
    return seen


@pytest.mark.parametrize("name, modules, stride, options", [
    ("resnet18", ("layer3", "layer4"), 8, DILATED), ("resnet18@1", ("act1", "layer1"), 4, DILATED),
    ("convnext_atto@2", ("stages.1", "stages.2"), 8, DILATED), ("mobilenetv3_small_075@2", ("blocks.0", "blocks.1"), 8, {}),
    ("tf_efficientnet_lite0@3", ("blocks.2", "blocks.4"), 8, DILATED), ("regnetx_002", ("s3", "s4"), 8, DILATED),
    ("densenet121", ("features.denseblock3", "features.norm5"), 32, {})])
def test_timms_levels_equal_the_whole_networks(name, modules, stride, options, tmp_path):
    timm = pytest.importorskip("timm")
    whole = rounded(timm.create_model(name.split("@")[0], **options))
    net = build_extractor(f"timm:{name}", file_of(whole, tmp_path / "a.pt")).eval()
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        levels = net.levels(image)
    for ours, theirs in zip(levels, hooked(whole, net.normalise(image), *modules), strict=True):
        assert_close(ours, theirs)
    assert [m.shape[1] for m in levels] == [net.middle_channels, net.channels]
    assert (levels[1].shape[2], net.stride) == (64 // stride, stride)


def test_timms_transformers_take_images_of_any_size(tmp_path):
    timm = pytest.importorskip("timm")
    whole = rounded(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True))
    net = build_extractor("timm:vit_tiny_patch16_224", file_of(whole, tmp_path / "a.safetensors", without=("head.", "norm."))).eval()
    image = torch.rand(1, 3, 96, 160)
    with torch.no_grad():
        features = net(image)
    tokens = hooked(whole, net.normalise(image), "blocks.11")[0][:, 1:]                            # without the class token
    assert_close(features, tokens.mT.unflatten(2, (6, 10)))
    assert net.stride == 16


def test_timms_files_may_lack_what_is_not_used_and_nothing_else(tmp_path):
    timm = pytest.importorskip("timm")
    whole, path = rounded(timm.create_model("convnext_atto")), tmp_path / "a.safetensors"
    net = build_extractor("timm:convnext_atto@2", file_of(whole, path, without=("head", "stages.3")))
    assert torch.equal(net.body.stages_2.blocks[1].conv_dw.weight, whole.stages[2].blocks[1].conv_dw.weight)
    with pytest.raises(ValueError, match=r"a.safetensors does not fit this backbone; missing \['stages.3.downsample.0.weight', "):
        build_extractor("timm:convnext_atto", str(path))
    with pytest.raises(ValueError, match=r"missing \['stages.1.blocks.0.conv_dw.weight'\]"):
        build_extractor("timm:convnext_atto@2", file_of(whole, path, without="stages.1.blocks.0.conv_dw.weight"))
    torch.save({**whole.state_dict(), "extra": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b.pt does not fit this backbone; missing \[\], unexpected \['extra'\]"):
        build_extractor("timm:convnext_atto", str(tmp_path / "b.pt"))


def test_no_unused_block_is_kept_of_timms_efficientnets():
    pytest.importorskip("timm")
    for name in ("tf_efficientnet_lite0@1", "tf_efficientnet_lite0@3", "mobilenetv3_small_075@2", "resnet18@2", "convnext_atto@1"):
        net = build_extractor(f"timm:{name}")
        net(torch.rand(2, 3, 64, 64)).sum().backward()
        assert [k for k, p in net.named_parameters() if p.grad is None] == [], name


def test_timms_normalisation_is_that_of_its_weights():
    timm = pytest.importorskip("timm")
    for name in ("tf_efficientnet_lite0@1", "mobilenetv3_small_075@1", "resnet18@1"):
        told, net = timm.get_pretrained_cfg(name.split("@")[0]), build_extractor(f"timm:{name}")
        assert_close(net.normalise.mean.flatten(), torch.tensor(told.mean))
        assert_close(net.normalise.std.flatten(), torch.tensor(told.std))
    assert told.mean != timm.get_pretrained_cfg("tf_efficientnet_lite0").mean


def test_timms_own_weights_are_asked_for_and_only_then(monkeypatch):
    timm, asked = pytest.importorskip("timm"), []
    create = timm.create_model

    def ask(name, pretrained=False, **options):
        asked.append(pretrained)
        return create(name, False, **options)
    monkeypatch.setattr(timm, "create_model", ask)
    net = build_extractor("timm:resnet18@2", "imagenet")
    assert asked == [True] and not net.body.bn1.weight.requires_grad and net.body.conv1.weight.requires_grad
    build_extractor("timm:resnet18@2")
    assert asked == [True, False]

    def offline(*args, **options):
        raise OSError("no network")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"cannot be fetched \(no network\); fetch resnet18 from https://huggingface.co/timm elsewhere"):
        build_extractor("timm:resnet18", "imagenet")


def test_without_timm_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm:resnet18 needs the package timm; install it: pip install timm"):
        build_extractor("timm:resnet18")


@pytest.mark.parametrize("name, told", [("resnt18", r"Unknown model \(resnt18\)"),
                                        ("resnet18@5", r"can't give levels \[4, 5\] of resnet18"),
                                        ("tf_efficientnet_lite0@5", r"levels \[4, 5\]"), ("resnet18@x", "Unknown model"),
                                        ("mixer_s32_224", "timm:mixer_s32_224 fails on an image of 128 x 192 .*an extractor is")])
def test_what_timm_cannot_give_is_refused(name, told):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=told):
        build_extractor(f"timm:{name}")


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_075@2", "torchvision:mobilenet_v3_small"])
def test_libraries_networks_are_drawn_by_the_seed_and_by_nothing_else(name):
    if name.startswith("timm"):
        timm = pytest.importorskip("timm")
        plain = lambda: timm.create_model("mobilenetv3_small_075", features_only=True, out_indices=(1, 2), output_stride=8)
    else:
        plain = torchvision.models.mobilenet_v3_small
    torch.manual_seed(5)
    theirs, after = plain(), torch.rand(3)
    torch.manual_seed(5)
    ours, ours_after = build_extractor(name), torch.rand(3)
    first = lambda net: next(p for p in net.parameters() if p.ndim == 4)
    assert torch.equal(first(ours), first(theirs)) and torch.equal(after, ours_after)           # the try-out draws nothing


# ------------------------------------------------------------------------------------------------ one's own

class Own(Extractor):
    "A backbone as a user writes it."
    channels, middle_channels, stride = 12, 6, 8

    def __init__(self):
        super().__init__()
        self.normalise = Normalise((0.5,) * 3, (0.25,) * 3)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.Sequential(nn.Conv2d(6, 12, 3, 2, 1), nn.ReLU()))


class Wrong(Own):
    channels = 13


class Nested:
    Own = Own


def make_own(): return Own()


def needs_more(channels): return Own()


def broken(): raise AttributeError("no such thing")


def test_a_class_a_function_an_address_and_an_object_are_taken():
    for backbone in (Own, make_own, "test_backbones:Own", "test_backbones:make_own", "test_backbones:Nested.Own"):
        torch.manual_seed(2)
        net = build_extractor(backbone)
        torch.manual_seed(2)
        assert type(net) is Own and torch.equal(net.body[0].weight, Own().body[0].weight) and net.training
    assert build_extractor(net) is net
    for backbone, kind in (("mlan.networks:SmallExtractor", SmallExtractor), (lambda: VGGExtractor("caffe"), VGGExtractor)):
        assert type(build_extractor(backbone)) is kind


@pytest.mark.parametrize("backbone, told", [
    (Wrong, "backbone Wrong says channels 13 .*an extractor is an nn.Module"),
    ("test_backbones:Wrong", "backbone test_backbones:Wrong says"),
    (nn.Identity(), "backbone that was given is no extractor; an extractor is"), (dict, "backbone dict is no extractor"),
    (needs_more, "backbone needs_more can't be imported and called .*channels.*without arguments"),
    (None, "backbone that was given can't be imported and called"), (broken, "broken can't be imported and called .no such thing"),
    ("no_such_package:Own", "No module named 'no_such_package'.*on Python's path"),
    ("test_backbones:Nowhere", "has no attribute 'Nowhere'"),
    ("test_backbones:", "choose one of small"), (":Own", "choose one of small"),
    ("resnet18", "choose one of small, resnet50, resnet101, vgg16, "),
    ("__main__:Nowhere", "it was defined in a notebook or script: define it in a module, or give the thing itself")])
def test_what_is_no_extractor_is_refused_in_one_sentence(backbone, told):
    with pytest.raises(ValueError, match=told):
        build_extractor(backbone)


def test_a_backbone_of_ones_own_brings_its_own_weights(tmp_path):
    for weights in ("imagenet", str(tmp_path)):
        with pytest.raises(ValueError, match="brings its own weights; set weights='none'"):
            build_extractor(Own, weights)


def in_main(name: str) -> type:
    "A class as a notebook or script would have defined it."
    return type(name, (Own,), {"__module__": "__main__", "__qualname__": name})


def test_names_of_backbones(monkeypatch):
    assert [backbone_name(b) for b in (*BACKBONES, "timm:a@3")] == [*BACKBONES, "timm:a@3"]
    assert (backbone_name(Own), backbone_name(make_own)) == ("test_backbones:Own", "test_backbones:make_own")
    assert backbone_name(SmallExtractor) == "mlan.networks:SmallExtractor"
    assert backbone_name(in_main("Mine")) == "__main__:Mine"
    hidden = type("Own", (Own,), {"__module__": __name__, "__qualname__": "Own"})                  # another stands at that address
    class Inside(Own): pass
    unnamed = lambda: Own()
    unnamed.__module__ = "__main__"
    for nameless in (Own(), lambda: Own(), Inside, hidden, unnamed, in_main("Mine")(), None, 3):
        with pytest.raises(ValueError, match="define it in a module, as a class or function at its top level"):
            backbone_name(nameless)
    monkeypatch.setattr(sys.modules["__main__"], "Mine", in_main("Mine"), raising=False)
    assert type(build_extractor("__main__:Mine")).__name__ == "Mine"                               # in the notebook itself


# ------------------------------------------------------------------------------------------------ checkpoints and runs

def saved(net, path, backbone):
    "A checkpoint of 19 classes."
    settings = make_settings("streets:engine", "streets:camera", backbone=backbone)
    save_segmenter(net, path, settings, shared_classes(CITYSCAPES, CITYSCAPES))
    return path


@pytest.mark.parametrize("backbone", ["small", "resnet50", "timm:tf_efficientnet_lite0@3", "timm:densenet121@1", "torchvision:mobilenet_v2",
                                      "test_backbones:Own"])
def test_a_checkpoint_is_read_back_by_its_backbones_name(backbone, tmp_path):
    if backbone.startswith("timm"):
        pytest.importorskip("timm")
    net = with_history(Segmenter(build_extractor(backbone, style="caffe" if backbone == "resnet50" else None), 19))
    again, about = load_segmenter(saved(net, tmp_path / "a.pt", backbone))
    image = torch.rand(1, 3, 64, 96)
    assert torch.equal(net(image), again(image)) and len(about["classes"]) == 19
    assert again.extractor.style == net.extractor.style == ("caffe" if backbone == "resnet50" else None)


def test_a_notebooks_backbone_is_given_to_load(tmp_path):
    mine = in_main("Elsewhere")
    net = with_history(Segmenter(mine(), 19))
    path = saved(net, tmp_path / "a.pt", backbone_name(mine))
    with pytest.raises(ValueError, match="__main__:Elsewhere can't be .*defined in a notebook or script.*load_segmenter's backbone"):
        load_segmenter(path)
    image = torch.rand(1, 3, 64, 96)
    for backbone in (mine, lambda: mine(), mine(), "test_backbones:Own"):
        assert torch.equal(load_segmenter(path, backbone=backbone)[0](image), net(image))
    for other in (SmallExtractor, "small"):
        with pytest.raises(ValueError, match="a.pt is not a checkpoint of this package and backbone"):
            load_segmenter(path, backbone=other)


@pytest.mark.parametrize("backbone", ["test_backbones:Own", "timm:resnet18@3"])
def test_a_run_with_another_backbone(backbone, tmp_path, no_report):
    if backbone.startswith("timm"):
        pytest.importorskip("timm")
    result = adapt(*PAIR, method="cr_al", out=tmp_path, progress=False, backbone=backbone,
                   **few("cr_al", steps=2, warmup_steps=2, val_every=0, batch_size=2))
    assert result.miou is not None and result.record["settings"]["backbone"] == backbone
    kind = {"test": Own, "timm": TimmExtractor}[backbone[:4]]
    assert isinstance(load_segmenter(result.out / "checkpoint.pt")[0].extractor, kind)


# ------------------------------------------------------------------------------------------------ passes and memory

@pytest.mark.parametrize("make", [SmallExtractor, lambda: ResNetExtractor("resnet50")], ids=["small", "resnet50"])
def test_one_pass_equals_two_if_batch_norm_is_frozen(make):
    net = freeze_batch_norm(with_history(make()).train().double())
    source, target = torch.rand(2, 1, 3, 40, 56, dtype=torch.float64)

    def features_and_gradient(*batches):
        net.zero_grad()
        features = torch.cat([net(b) for b in batches])
        features.square().mean().backward()
        return features.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])

    for one, two in zip(features_and_gradient(torch.cat([source, target])), features_and_gradient(source, target)):
        assert_close(one, two)
    net.train()
    one, two = (features_and_gradient(*batches)[0] for batches in ((torch.cat([source, target]),), (source, target)))
    assert (one - two).norm() > 0.1 * two.norm()


@pytest.mark.parametrize("frozen", [True, False])
def test_checkpointing_changes_memory_and_nothing_else(frozen):
    plain, sparing = with_history(ResNetExtractor("resnet50")), ResNetExtractor("resnet50", checkpointing=True)
    sparing.load_state_dict(plain.state_dict())
    image, results, kept = torch.rand(2, 3, 64, 64), [], []
    for net in (plain, sparing):
        net.train()
        if frozen:
            freeze_batch_norm(net)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.setdefault(x.data_ptr(), x), lambda x: x):
            features = net(image)
        features.square().mean().backward()
        kept.append(sum(x.nbytes for x in saved.values()))
        results.append({"features": features, **{k: p.grad for k, p in net.named_parameters()}, **net.state_dict()})
    for name, value in results[0].items():
        assert_close(results[1][name], value, msg=name)
    assert (kept[1] < 0.5 * kept[0]) == frozen       # blocks whose BatchNorm counts are not run twice


@torch.no_grad()
def test_channels_last_goes_through():
    for net in (ResNetExtractor("resnet50", "caffe"), VGGExtractor(), SmallExtractor()):
        with_history(net)
        image = torch.rand(2, 3, 64, 64)
        expected = net(image)
        features = net.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
        assert features.is_contiguous(memory_format=torch.channels_last)
        assert_close(features, expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ real weights

def test_real_files_tell_their_style():
    caffe, vgg = weights_file("resnet50_caffe_fp16.safetensors"), weights_file("vgg16_features_fp16.safetensors")
    assert build_extractor("resnet50", caffe).style == "caffe"
    assert build_extractor("vgg16", vgg).style == "torchvision"
    with pytest.raises(ValueError, match="seen inputs of 0 to 255; write caffe:"):
        build_extractor("resnet50", f"torchvision:{caffe}")
    with pytest.raises(ValueError, match="does not fit this backbone"):
        build_extractor("resnet101", caffe)


def test_the_same_filters_fed_with_unit_variance_count_as_torchvisions(tmp_path):
    "What a conversion of the real file would hold: filters in RGB for unit variance, and the variances that these then see."
    state = {k: v.float() for k, v in load_file(weights_file("resnet50_caffe_fp16.safetensors")).items()}
    state["conv1.weight"] = state["conv1.weight"].flip(1)
    for name, power in (("running_var", 2), ("running_mean", 1)):
        state[f"bn1.{name}"] /= (0.226 * 255) ** power
    torch.save(state, tmp_path / "a.pth")
    assert build_extractor("resnet50", str(tmp_path / "a.pth")).style == "torchvision"


@torch.no_grad()
def test_features_of_real_weights_equal_those_of_timms_whole_network():
    timm, path = pytest.importorskip("timm"), weights_file("tf_efficientnet_lite0_fp16.safetensors")
    if not Path(path).is_file():
        pytest.skip("MLAN_WEIGHTS has no tf_efficientnet_lite0_fp16.safetensors")
    whole, image = timm.create_model("tf_efficientnet_lite0", output_stride=8).eval(), torch.rand(1, 3, 128, 192)
    whole.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    net = build_extractor("timm:tf_efficientnet_lite0@3", path).eval()
    middle, features = net.levels(image)
    for ours, theirs in zip((middle, features), hooked(whole, 2 * image - 1, "blocks.2", "blocks.4"), strict=True):
        assert_close(ours, theirs)
    deepest = build_extractor("timm:tf_efficientnet_lite0", path).eval()
    assert_close(deepest.levels(image)[0], features)
    assert features.shape == (1, 112, 16, 24) and deepest(image).shape == (1, 320, 16, 24) and features.std() > 0.1


def frames(folder: Path, split: str, n: int, size=(120, 160)) -> list:
    "Evenly spaced CamVid frames, (1, 3, H, W) in [0, 1], each with its labels (H', W')."
    ds = camvid(folder, split)
    chosen = np.linspace(0, len(ds) - 1, n).astype(int)
    images = [torch.from_numpy(ds.image(i)).permute(2, 0, 1)[None] / 255 for i in chosen]
    small = [F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False) for x in images]
    return [(x, torch.from_numpy(ds.labels(i))) for x, i in zip(small, chosen)]


@torch.inference_mode()
def samples(features, pairs) -> tuple:  # (n, channels), class ids (n,)
    "Every labelled feature pixel with the class at its place."
    xs, ys = [], []
    for image, labels in pairs:
        maps = features(image)
        ids = F.interpolate(labels[None, None].float(), maps.shape[-2:], mode="nearest-exact").long().flatten()
        known = ids < 11
        xs.append(maps[0].flatten(1).T[known])
        ys.append(ids[known])
    return torch.cat(xs), torch.cat(ys)


def probe(features, train, test) -> float:
    "Pixel accuracy, in percent, of a ridge classifier on frozen features."
    torch.set_num_threads(1)                     # two threads on one core wait for each other most of the time
    (x, y), (u, v) = samples(features, train), samples(features, test)
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, u = (F.pad((z - mean) / deviation, (0, 1), value=1.0) for z in (x, u))
    gram = x.T @ x / len(x) + 0.1 * torch.eye(x.shape[1])
    answer = u @ torch.linalg.solve(gram, x.T @ F.one_hot(y, 11).float() / len(x))
    return 100 * (answer.argmax(1) == v).float().mean().item()


def normalised_as(net, style):
    net.normalise = Normalise(**STYLES[style])
    return net


@pytest.mark.data
def test_resnet_features_transfer_to_real_images_if_normalised_as_trained(mlan_data):
    train, test = (frames(mlan_data / "camvid", *which) for which in (("train", 30), ("test", 15)))
    path = weights_file("resnet50_caffe_fp16.safetensors")
    right = probe(build_extractor("resnet50", path).eval(), train, test)
    wrong = probe(normalised_as(build_extractor("resnet50", path).eval(), "torchvision"), train, test)
    random = probe(build_extractor("resnet50").eval(), train, test)
    print(f"ResNet-50 {right:.1f} %, wrong normalisation {wrong:.1f} %, random weights {random:.1f} %")
    assert right > 70 and right > wrong + 8 and right > random + 6


@pytest.mark.slow
@pytest.mark.data
def test_vgg_features_transfer_to_real_images_if_normalised_as_trained(mlan_data):
    train, test = (frames(mlan_data / "camvid", *which) for which in (("train", 30), ("test", 15)))
    convolutions = lambda net: lambda image: net.features(net.normalise(image))      # the file ends with conv5_3
    net = build_extractor("vgg16", weights_file("vgg16_features_fp16.safetensors"))
    right, random = (probe(convolutions(n), train, test) for n in (net, build_extractor("vgg16")))
    wrong = probe(convolutions(normalised_as(net, "caffe")), train, test)
    print(f"VGG-16 {right:.1f} %, wrong normalisation {wrong:.1f} %, random weights {random:.1f} %")
    assert right > 67 and right > wrong + 6 and right > random + 4

"The networks at full size, against torchvision's, against nets written out by hand, and with real weights where they are at hand."

import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

from mlan.layouts import camvid
from mlan.networks import STYLES, Normalise, ResNetExtractor, SmallExtractor, VGGExtractor, build_extractor, freeze_batch_norm

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
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


def test_weights_that_cannot_be_fetched_are_named_with_what_to_do(monkeypatch):
    def offline(self, *args, **kwargs):
        raise urllib.error.URLError("Name or service not known")
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
    from safetensors.torch import load_file
    state = {k: v.float() for k, v in load_file(weights_file("resnet50_caffe_fp16.safetensors")).items()}
    state["conv1.weight"] = state["conv1.weight"].flip(1)
    for name, power in (("running_var", 2), ("running_mean", 1)):
        state[f"bn1.{name}"] /= (0.226 * 255) ** power
    torch.save(state, tmp_path / "a.pth")
    assert build_extractor("resnet50", str(tmp_path / "a.pth")).style == "torchvision"


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


@pytest.mark.data
def test_vgg_features_transfer_to_real_images_if_normalised_as_trained(mlan_data):
    train, test = (frames(mlan_data / "camvid", *which) for which in (("train", 30), ("test", 15)))
    convolutions = lambda net: lambda image: net.features(net.normalise(image))      # the file ends with conv5_3
    net = build_extractor("vgg16", weights_file("vgg16_features_fp16.safetensors"))
    right, random = (probe(convolutions(n), train, test) for n in (net, build_extractor("vgg16")))
    wrong = probe(convolutions(normalised_as(net, "caffe")), train, test)
    print(f"VGG-16 {right:.1f} %, wrong normalisation {wrong:.1f} %, random weights {random:.1f} %")
    assert right > 67 and right > wrong + 6 and right > random + 4

"""ADVENT's step the way our trainer computes one: the equal setting, and the options that can be added to it.

What differs in `equal`, none of which changes a number beyond rounding: log-softmax is taken once a map and serves the loss and
the entropy map; entropy maps are kept for the critics instead of made again; the critics' answer to the target is computed
once and serves both players; the segmentation loss gathers no pixels by a mask; gradients are set to None, not filled with zeros;
no number is fetched from the device inside the step.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from step import CLASSES
from torch import nn

from mlan.backbones import build_extractor
from mlan.networks import AtrousClassifier, freeze_batch_norm
from mlan.objective import poly


@dataclass(frozen=True)
class Options:
    "What our step does otherwise; the last four change numbers."
    once: bool = False  # each weight is updated once a step; ADVENT's optimiser has most of them three or four times in its list
    channels_last: bool = False
    fused: bool = False  # optimisers
    frozen_norm: bool = False  # BatchNorm as the paper and our trainer have it: fixed statistics
    together: bool = False  # both domains in one forward; needs equal sizes and frozen statistics
    bf16: bool = False
    compile: bool = False


LADDER = ("once", "channels_last", "fused", "frozen_norm", "together", "bf16", "compile")
CHANGING = LADDER[3:]  # the losses of the first iteration, too


def our_net(peer_net: nn.Module, device: torch.device) -> nn.ModuleDict:
    "Our extractor and two of our classifiers, arranged and weighted as the peer's network."
    net = nn.ModuleDict({"extractor": build_extractor("resnet101", "none", style="deeplab"),
                         "aux": AtrousClassifier(1024, CLASSES), "main": AtrousClassifier(2048, CLASSES)})
    net["extractor"].body.maxpool.ceil_mode = True
    names = {"layer5.conv2d_list": "aux.branches", "layer6.conv2d_list": "main.branches"}
    state = {next((key.replace(a, b) for a, b in names.items() if key.startswith(a)), f"extractor.body.{key}"): value
             for key, value in peer_net.state_dict().items()}
    net.load_state_dict(state)
    for module in net["extractor"].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return net.to(device)


class EqualStep:
    "ADVENT's step the way our trainer computes one."

    def __init__(self, net: nn.ModuleDict, critics: list, batch: tuple,  # images, labels, target
                 cfg, options: Options):
        self.net, self.critics, self.cfg, self.o = net, critics, cfg.TRAIN, options
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        for module in (net, *critics):
            module.to(memory_format=layout)
        self.images, self.target = (x.contiguous(memory_format=layout) for x in (batch[0], batch[2]))
        self.labels = batch[1]
        heads, rate, fused = [*net["aux"].parameters(), *net["main"].parameters()], self.cfg.LEARNING_RATE, options.fused or None
        body = [p for part in net["extractor"].body for m in part.modules() for p in m.parameters() if p.requires_grad]
        self.learned = [*dict.fromkeys([*body, *heads])]
        body = [*dict.fromkeys(body)] if options.once else body         # else a weight is there for itself, its block and its layer
        self.learn = torch.optim.SGD([{"params": body, "factor": 1}, {"params": heads, "factor": 10}], rate, self.cfg.MOMENTUM,
                                     weight_decay=self.cfg.WEIGHT_DECAY, fused=fused)
        self.judged = [p.requires_grad_() for c in critics for p in c.parameters()]
        self.judge = torch.optim.Adam(self.judged, self.cfg.LEARNING_RATE_D, (0.9, 0.99), fused=fused)
        self.features = torch.compile(self._features) if options.compile else self._features

    def __call__(self, i: int) -> dict:  # the losses that ADVENT prints, as tensors
        decay = poly(i, self.cfg.MAX_ITERS, self.cfg.POWER)
        for group in self.learn.param_groups:
            group["lr"] = self.cfg.LEARNING_RATE * group["factor"] * decay
        self.judge.param_groups[0]["lr"] = self.cfg.LEARNING_RATE_D * decay
        self.net.train()
        if self.o.frozen_norm:
            freeze_batch_norm(self.net)
        self.learn.zero_grad(set_to_none=True), self.judge.zero_grad(set_to_none=True)
        if self.o.together:
            losses = self._together()
        else:
            losses = self._source(self._logits(self.images)) | self._target(self._logits(self.target))
        self.learn.step(), self.judge.step()
        return losses

    def _features(self, images):  # of both heads
        extractor = self.net["extractor"]
        x = extractor.normalise(images)
        for part in extractor.body:
            before, x = x, part(x)
        return before, x                                                # of layer3 and of layer4

    def _logits(self, images):  # of both heads, at the features' size
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.o.bf16):
            return self._full([self.net[name](f) for name, f in zip(("aux", "main"), self.features(images))])

    def _full(self, maps):  # in full precision
        return [m.float() for m in maps] if self.o.bf16 else maps

    def _log_p(self, logits, size):  # of both heads, at the images' size
        return [F.interpolate(m, size, mode="bilinear", align_corners=True).log_softmax(1) for m in logits]

    def _told(self, log_p):  # the critics' answers to the entropy maps
        with torch.autocast(log_p[0].device.type, torch.bfloat16, enabled=self.o.bf16):
            return self._full([critic(m.exp() * m * (-1 / math.log(CLASSES))) for critic, m in zip(self.critics, log_p)])

    def _source(self, logits, backward=True):
        log_p = self._log_p(logits, self.labels.shape[-2:])
        aux, main = (F.nll_loss(m, self.labels, ignore_index=255) for m in log_p)
        seg = self.cfg.LAMBDA_SEG_AUX * aux + self.cfg.LAMBDA_SEG_MAIN * main
        if backward:
            seg.backward()
        sum(F.softplus(told).mean() for told in self._told([m.detach() for m in log_p])).div(2).backward()      # source is 0
        return {"loss_seg_src_aux": aux.detach(), "loss_seg_src_main": main.detach(), **({} if backward else {"seg": seg})}

    def _target(self, logits, seg=0.0):
        told = self._told(self._log_p(logits, self.target.shape[-2:]))
        adv, dis = ([F.softplus(sign * m).mean() for m in told] for sign in (1, -1))                             # target is 1
        sum(dis).div(2).backward(inputs=self.judged, retain_graph=True)
        fool = self.cfg.LAMBDA_ADV_AUX * adv[0] + self.cfg.LAMBDA_ADV_MAIN * adv[1]
        (seg + fool).backward(inputs=self.learned)
        values = (*adv, *(d / 2 for d in dis))
        return {name: v.detach() for name, v in zip(("loss_adv_trg_aux", "loss_adv_trg_main", "loss_d_aux", "loss_d_main"), values)}

    def _together(self):
        n = len(self.images)
        logits = self._logits(torch.cat([self.images, self.target]))
        losses = self._source([m[:n] for m in logits], backward=False)
        return losses | self._target([m[n:] for m in logits], losses.pop("seg"))


def ladder(size: tuple, target_size: tuple, wanted: list) -> dict:  # {name: Options}, each with one option more
    "The options that can be used here, added one at a time."
    steps, options = {"equal": Options()}, Options()
    for name in wanted:
        if name == "together" and size != target_size:
            continue
        options = replace(options, **{name: True})
        steps[f"+ {name}"] = options
    return steps

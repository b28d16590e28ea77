"""A stand-in for the published HCGNet program: its classes' names, attributes and behaviour, written from the paper.

`pyext.accelerate` must recognise such classes without importing them; they are also the plain torch to compare with.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class BasicConv(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, **conv):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **conv)

    def forward(self, x):
        return self.conv(self.relu(self.norm(x)))


class GatedModule(nn.Module):
    """What the two published classes have in common after their squeeze cell."""

    def add_gates(self, channels, reduction_factor, forget_factor):
        hidden, forget = 2 * channels // reduction_factor, channels // forget_factor
        self.conv_3x3 = BasicConv(channels, channels, 3, padding=1, groups=channels)
        self.conv_5x5 = BasicConv(channels, channels, 3, padding=2, dilation=2, groups=channels)
        self.global_context3x3 = nn.Conv2d(channels, 1, 1)
        self.global_context5x5 = nn.Conv2d(channels, 1, 1)
        self.fcall = nn.Conv2d(2 * channels, hidden, 1)
        self.bn_attention = nn.BatchNorm1d(hidden)
        self.fc3x3 = nn.Conv2d(hidden, channels, 1)
        self.fc5x5 = nn.Conv2d(hidden, channels, 1)
        self.global_forget_context = nn.Conv2d(channels, 1, 1)
        self.global_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.bn_forget = nn.BatchNorm1d(forget)
        self.fc1 = nn.Conv2d(channels, forget, 1)
        self.fc2 = nn.Conv2d(forget, channels, 1)

    def gate(self, u):
        def pooled(x, context):
            attention = context(x).flatten(2).softmax(2).unflatten(2, x.shape[2:])
            return self.global_pool(x * attention) * (x.shape[2] * x.shape[3])

        forget = torch.tanh(self.bn_forget(self.fc1(pooled(u, self.global_forget_context))[:, :, 0, 0]))
        forget = torch.sigmoid(self.fc2(forget[:, :, None, None]))
        small = pooled(self.conv_3x3(u), self.global_context3x3)
        large = pooled(self.conv_5x5(u), self.global_context5x5)
        hidden = torch.tanh(self.bn_attention(self.fcall(torch.cat([small, large], 1))[:, :, 0, 0]))[:, :, None, None]
        weights = F.softmax(torch.stack([self.fc3x3(hidden), self.fc5x5(hidden)]), 0)
        return u * forget + (weights[0] * small + weights[1] * large)


class SMG(GatedModule):
    def __init__(self, in_channels, growth_rate, bn_size=4, groups=4, reduction_factor=2, forget_factor=2):
        super().__init__()
        self.in_channels = in_channels
        self.growth_rate = growth_rate
        self.reduction_factor = reduction_factor
        self.forget_factor = forget_factor
        self.conv1_1x1 = BasicConv(in_channels, bn_size * growth_rate, 1)
        self.conv2_3x3 = BasicConv(bn_size * growth_rate, growth_rate, 3, padding=1, groups=groups)
        self.add_gates(growth_rate, reduction_factor, forget_factor)

    def forward(self, x):
        return torch.cat([x, self.gate(self.conv2_3x3(self.conv1_1x1(x)))], 1)


class HybridBlock(nn.Sequential):
    def __init__(self, num_layers, in_channels, bn_size, growth_rate):
        super().__init__()
        for i in range(num_layers):
            self.add_module(f"SMG{i + 1}", SMG(in_channels + growth_rate * i, growth_rate, bn_size))


class DropBlock(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        kept = (torch.rand(x.shape[0], 1, *x.shape[2:]) >= self.drop_prob).to(x)
        return x * kept * kept.numel() / kept.sum()


class DropScheduler(nn.Module):
    """Takes the drop probability from a counter of its class whenever it is stepped, as the published one does."""

    global_epoch = 0

    def __init__(self):
        super().__init__()
        self.dropblock = DropBlock(0)

    def step(self):
        self.dropblock.drop_prob = 0.1 - 0.05 * (1 + math.cos(math.pi * DropScheduler.global_epoch / 10))

    def forward(self, x):
        return self.dropblock(x)


class Transition(GatedModule):
    def __init__(self, in_channels, out_channels, stride=2, drops=True):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.reduction_factor = self.forget_factor = 4
        self.reduce_channels = (in_channels - out_channels) // 2
        width = in_channels - self.reduce_channels
        self.conv1_1x1 = BasicConv(in_channels, width, 1)
        self.conv2_3x3 = BasicConv(width, out_channels, 3, stride=stride, padding=1)
        self.add_gates(out_channels, 4, 4)
        if drops:
            self.dropblock = DropScheduler()

    def forward(self, x):
        drops = "dropblock" in self._modules
        if drops:
            self.dropblock.step()
        x = self.gate(self.conv2_3x3(self.conv1_1x1(x)))
        return self.dropblock(x) if drops else x


class CifarNet(nn.Module):
    def __init__(self, growth_rates=(8, 12), num_layers=(2, 2), num_classes=10):
        super().__init__()
        channels = 2 * growth_rates[0]
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, channels, 3, padding=1, bias=False))
        for i, (growth, layers) in enumerate(zip(growth_rates, num_layers, strict=True), 1):
            self.features.add_module(f"HybridBlock{i}", HybridBlock(layers, channels, 4, growth))
            channels += growth * layers
            if i < len(growth_rates):
                self.features.add_module(f"Transition{i}", Transition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(F.relu(self.features(x)), (1, 1))
        return self.classifier(x.view(x.size(0), -1))


class ImageNetNet(nn.Module):
    def __init__(self, growth_rates=(8, 12), num_layers=(2, 2), num_classes=10):
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for i, (width, stride) in enumerate(((32, 2), (32, 1), (64, 1))):
            self.features.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, stride, 1, bias=False))
            self.features.add_module(f"norm{i}", nn.BatchNorm2d(width))
            self.features.add_module(f"relu{i}", nn.ReLU(inplace=True))
            channels = width
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        for i, (growth, layers) in enumerate(zip(growth_rates, num_layers, strict=True), 1):
            self.features.add_module(f"hybridblock{i}", HybridBlock(layers, channels, 4, growth))
            channels += growth * layers
            if i < len(growth_rates):
                self.features.add_module(f"transition{i}", Transition(channels, channels // 2, drops=False))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.features.add_module("relu5", nn.ReLU(inplace=True))
        self.features.add_module("avg_pool", nn.AdaptiveAvgPool2d((1, 1)))
        self.fc_drop = nn.Dropout(p=0.1, inplace=True)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x):
        features = self.features(x)
        return self.classifier(features.view(features.size(0), -1))

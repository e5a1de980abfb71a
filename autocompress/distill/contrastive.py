"""Contrastive distillation: a sample's two embeddings find each other among those of other samples."""

import math
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.distill.pairs import in_full_precision, same_batch
from autocompress.errors import DistillationError

# Tag of its stream of random numbers; 0 to 4 belong to training.
_DRAWS = 5


@final
class Contrastive(nn.Module):
    """Two linear embeddings, a memory of each, and the noise-contrastive loss between them (CRD).

    The memories hold the embedding of each sample of a data set. A student's embedding is to find the
    teacher's of the same sample in the teacher's memory among negatives, drawn uniformly from the other
    samples, with replacement; or among all others, where they are not more than `negatives`. And the other
    way round. All that changes is in parameters and buffers; draws are a function of seed and step, so that
    training resumes exactly.

    In training mode each run is a step: it moves the memories. In evaluation mode nothing changes. A step
    takes products with both memories and a copy of them, 512 bytes a sample each by default.

    Source: Tian, Krishnan & Isola, "Contrastive Representation Distillation", ICLR 2020, section 3; memories
    and their constants after Wu et al., CVPR 2018. Weight: .8.

    Attributes:
        student_memory: `(samples, dimension)`, rows of about length 1.
        teacher_memory: `(samples, dimension)`.
        normalizers: The constants Z of the student's and the teacher's loss, `(2,)`, from the first batch;
            0 before.
        step: Batches so far.
    """

    student_memory: Tensor
    teacher_memory: Tensor
    normalizers: Tensor
    step: Tensor

    def __init__(
        self,
        features_student: int,
        features_teacher: int,
        samples: int,
        *,
        negatives: int = 16_384,
        dimension: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Draw the embeddings and memories.

        Args:
            features_student: Of a sample, flattened.
            features_teacher: Of a sample, flattened.
            samples: Of the data set, at least 2.
            negatives: Drawn for each sample, at least 1.
            dimension: Of the embeddings.
            temperature: Of the inner products, above 0.
            momentum: Share of the old embedding in a memory, 0 to 1.
            seed: Of the first weights, the first memories and the draws.

        Raises:
            DistillationError: A number is out of its range.
        """
        super().__init__()
        if samples < 2 or negatives < 1 or temperature <= 0 or not 0 <= momentum < 1:
            raise DistillationError(
                "contrastive distillation needs 2 samples or more, 1 negative or more, a temperature above 0 "
                f"and a momentum in [0, 1), got {samples}, {negatives}, {temperature:g} and {momentum:g}"
            )
        self.negatives, self.temperature, self.momentum, self.seed = negatives, temperature, momentum, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed_student = nn.Linear(features_student, dimension)
            self.embed_teacher = nn.Linear(features_teacher, dimension)
            # Uniform numbers of variance 1 / dimension: rows of about length 1.
            bound = math.sqrt(3 / dimension)
            for name in ("student_memory", "teacher_memory"):
                self.register_buffer(name, torch.empty(samples, dimension).uniform_(-bound, bound))
        self.register_buffer("normalizers", torch.zeros(2))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @in_full_precision
    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor) -> Tensor:
        """Return the loss of both sides, mean over the batch; in training mode, also move the memories.

        With l the inner product over the temperature, K negatives and n samples, `P = exp(l) / Z` stands
        against noise `q = K / n`: `-log(P / (P + q))` of the positive, `-log(q / (P + q))` of each negative.

        Args:
            student: Features, `(batch, ...)`.
            teacher: Features, `(batch, ...)`.
            indices: Which samples of the data set these are, `(batch,)`; each at most once.

        Raises:
            DistillationError: Features are of other samples or widths, or indices out of the data set.
        """
        features = same_batch(student, teacher, least=1)
        self._check(*features, indices)
        layers = self.embed_student, self.embed_teacher
        own, other = (F.normalize(f(x), dim=1) for f, x in zip(layers, features, strict=True))
        drawn = self._draw(indices)
        found = [
            self._products(own, self.teacher_memory, indices, drawn),
            self._products(other, self.student_memory, indices, drawn),
        ]
        if bool(self.normalizers.all()):
            normalizers = self.normalizers
        else:
            normalizers = torch.stack([x.detach().exp().mean() for x in found]) * len(self.student_memory)
        # log(K / n): what the logarithm of P is compared with.
        noise = math.log(drawn.shape[1] / len(self.student_memory))
        losses = []
        for products, constant in zip(found, normalizers, strict=True):
            excess = products - constant.log() - noise
            losses.append(F.softplus(-excess[:, 0]) + F.softplus(excess[:, 1:]).sum(dim=1))
        if self.training:
            self.normalizers = normalizers
            self.student_memory = self._moved(self.student_memory, own, indices)
            self.teacher_memory = self._moved(self.teacher_memory, other, indices)
            self.step = self.step + 1
        return torch.stack(losses).sum(dim=0).mean()

    def _draw(self, indices: Tensor) -> Tensor:
        """Return which samples are the negatives of each, `(batch, negatives)`."""
        others = len(self.student_memory) - 1
        if others <= self.negatives:
            ahead = torch.arange(others).expand(len(indices), others)
        else:
            (word,) = np.random.SeedSequence((_DRAWS, self.seed, int(self.step))).generate_state(1)
            generator = torch.Generator().manual_seed(int(word))
            ahead = torch.randint(others, (len(indices), self.negatives), generator=generator)
        # So many samples further on, around the end: never the sample itself.
        return (indices[:, None] + 1 + ahead.to(indices.device)) % (others + 1)

    def _products(self, anchors: Tensor, memory: Tensor, indices: Tensor, drawn: Tensor) -> Tensor:
        """Return inner products over the temperature, `(batch, 1 + negatives)`, the positive first."""
        chosen = torch.cat([indices[:, None], drawn], dim=1)
        # With the whole memory: copies of the drawn rows would be many times its size.
        return (anchors @ memory.T).gather(1, chosen) / self.temperature

    def _moved(self, memory: Tensor, embeddings: Tensor, indices: Tensor) -> Tensor:
        """Return a copy of the memory with the new embeddings; the old one is needed for the gradient."""
        mixed = self.momentum * memory[indices] + (1 - self.momentum) * embeddings.detach()
        return memory.index_copy(0, indices, F.normalize(mixed, dim=1))

    def _check(self, student: Tensor, teacher: Tensor, indices: Tensor) -> None:
        got = student.shape[1], teacher.shape[1]
        needed = self.embed_student.in_features, self.embed_teacher.in_features
        if got != needed:
            raise DistillationError(
                f"this loss was made for {needed[0]} features of the student and {needed[1]} of the teacher, "
                f"got {got[0]} and {got[1]}; make it anew for these layers"
            )
        samples = len(self.student_memory)
        if indices.shape != student.shape[:1] or int(indices.min()) < 0 or int(indices.max()) >= samples:
            raise DistillationError(
                f"indices must be one a sample ({len(student)},), in 0..{samples - 1}, got "
                f"{tuple(indices.shape)} in {indices.min().item()}..{indices.max().item()}"
            )

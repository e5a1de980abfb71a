"""Slices, scored and compared with the largest network, against plain networks that are copied out."""

import numpy as np
import torch
from small_runs import small_recipe, small_space

from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import resize
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.run import load_recipe_data
from autocompress.strategy import DISTANCE
from autocompress.training.evaluate import calibration_batches
from autocompress.training.task import load_task


def test_the_distance_is_the_divergence_of_plain_networks_but_for_the_entropy_of_the_largest() -> None:
    recipe, space = small_recipe(), small_space()
    data, task = load_recipe_data(recipe), load_task(recipe.task)
    torch.manual_seed(0)
    supernet = space.supernet()
    images = calibration_batches(data, 48)
    codes = np.vstack([space.largest(), space.sample(3, np.random.default_rng(0))])
    found = SupernetEvaluator(supernet, data, task, images, compared=True)(codes)
    with torch.no_grad():
        networks = [extract(supernet, a, recalibrate(supernet, a, images)) for a in space.decode(codes)]
        batch = resize(torch.cat(images), (24, 24))
        outputs = [network(batch) for network in networks]
    whole = outputs[0].log_softmax(1)
    entropy = -float((whole.exp() * whole).sum(1).mean())
    for value, output in zip(found[DISTANCE], outputs, strict=True):
        divergence = torch.nn.functional.kl_div(
            output.log_softmax(1), whole, log_target=True, reduction="batchmean"
        )
        np.testing.assert_allclose(value, float(divergence) + entropy, rtol=1e-4)
    assert (found[DISTANCE][1:] > found[DISTANCE][0]).all()
    plain = SupernetEvaluator(supernet, data, task, images)(codes)
    assert DISTANCE not in plain
    np.testing.assert_array_equal(plain[task.metric], found[task.metric])

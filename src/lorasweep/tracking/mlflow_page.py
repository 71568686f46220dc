"""MLflow's web pages: their addresses, and how an experiment's looks when `lorasweep ui` opens it.

Left alone, MLflow makes a card for each metric and each prompt, by alphabet, and writes all params
of a run (some seventy) above each picture, which pushes it out of sight. So we store a view, as
the page's own *Share* button does: scores first, then one table of pictures, prompts by runs,
with one slider for the epoch, then training. Its JSON is not documented; seen in MLflow 3.17.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from lorasweep.core.text import listed, shown
from lorasweep.tracking import artifact_folder
from lorasweep.tracking.read_candidates import Candidate, sweeps
from lorasweep.tracking.store import (
    BEST,
    PICKED_TAG,
    SWEEP_TAG,
    TrackingError,
    differing,
    is_server,
    open_experiment,
    tagged,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DEFAULT_PORT = 5000
TRAINING_VIEW = "workflowType=machine_learning"  # else MLflow shows its pages for language models
VIEW_KEY = "lorasweep"  # in the page's address
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
FIRST = ("val/score", "val/loss_rel", "val/caption_gain", "val/gap", "val/prior_drift")
MAX_RUNS = 200
MAX_TAG = 20_000  # characters of an experiment's tag
MAX_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Which runs a page shows first: MLflow draws curves and pictures of ten."""

    sweep: str | None = None
    """Only its runs."""
    by: str | None = None
    """The runs with the best checkpoints by this score come first; None: the newest."""
    smaller_first: bool = True


def experiment_page(
    uri: str, experiment: str, port: int = DEFAULT_PORT, what: Shown | None = None
) -> str:
    """Address of the experiment's runs, with their curves and pictures as they are now.

    Raises TrackingError where there is no such sweep.
    """
    what = what or Shown()
    client, experiment_id = open_experiment(uri, experiment)
    root = _server(uri, port)
    address = f"{root}/#/experiments/{experiment_id}/runs?{TRAINING_VIEW}&compareRunsMode=CHART"
    if what.sweep is not None:
        names = sweeps(uri, experiment)
        if what.sweep not in names:
            raise TrackingError(
                f"there is no sweep {shown(what.sweep)}; there are: {listed(names) or 'none yet'}"
            )
    is_saved = _save_view(client, experiment_id, what)
    return f"{address}&viewStateShareKey={VIEW_KEY}" if is_saved else address


def page(uri: str, candidate: Candidate, port: int = DEFAULT_PORT) -> str:
    """Address of the candidate's page: on its server, or on the one that `lorasweep ui` starts."""
    root = _server(uri, port)
    experiment, model = quote(candidate.experiment_id, ""), quote(candidate.model_id, "")
    address = f"{root}/#/experiments/{experiment}/models/{model}"
    return f"{address}?{TRAINING_VIEW}"


def _server(uri: str, port: int) -> str:
    """The root of the pages' addresses, without the user name and password of the URI."""
    local = f"http://127.0.0.1:{port}"
    return re.sub(r"//[^/@]*@", "//", uri).rstrip("/") if is_server(uri) else local


def _save_view(client: MlflowClient, experiment_id: str, what: Shown) -> bool:
    """Fit the view to what is logged now; False when there is nothing to show yet.

    Filter and order are part of it: given in the address, MLflow would show no saved view.
    """
    runs = client.search_runs([experiment_id], max_results=MAX_RUNS)
    if not runs:
        return False
    metrics = sorted({key for run in runs for key in run.data.metrics})
    view = _view(metrics, _sample_keys(client, runs), _searched_params(runs))
    if what.sweep is not None:
        view["searchFilter"] = tagged({SWEEP_TAG: what.sweep})
    if what.by is not None:
        view |= {"orderByKey": f"metrics.`{BEST}{what.by}`", "orderByAsc": what.smaller_first}
    packed = _packed(view)
    if len(packed) > MAX_TAG:
        return False
    client.set_experiment_tag(experiment_id, VIEW_TAG, packed)
    return True


def _view(metrics: Sequence[str], samples: Sequence[str], params: Iterable[str]) -> dict[str, Any]:
    best = [key for key in metrics if key.startswith(BEST)]
    scores = [key for key in metrics if not key.startswith((BEST, "train/"))]
    ends = tuple(key for key in scores if key.endswith(("_lo", "_hi")))  # of intervals
    ordered = [key for key in FIRST if key in scores]
    ordered += [key for key in scores if key not in ordered and key not in ends]
    training = [key for key in metrics if key.startswith("train/")]
    columns = [f"params.`{key}`" for key in params]
    columns += [f"metrics.`{key}`" for key in [*best[::-1], *ordered[:3]]]
    return {
        "selectedColumns": [*columns, f"tags.`{PICKED_TAG}`", f"tags.`{SWEEP_TAG}`"],
        "compareRunSections": [
            _section("scores", columns=3, height=340),
            _section("pictures", columns=1, height=900),
            _section("training", columns=3, height=300),
            _section("intervals", columns=3, height=300, display=False),
            # here MLflow adds a card for each prompt on its own
            _section("samples", columns=3, height=300, display=False),
        ],
        "compareRunCharts": [
            *(_curve(key, "scores") for key in ordered),
            *([_pictures(samples)] if samples else []),
            *(_curve(key, "training") for key in training),
            *(_curve(key, "intervals") for key in ends),
        ],
        "isAccordionReordered": True,
    }


def _section(name: str, *, columns: int, height: int, display: bool = True) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": name,
        "display": display,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
        "columns": columns,
        "cardHeight": height,
    }


def _curve(metric: str, section: str) -> dict[str, Any]:
    return {
        **_chart(metric, "LINE", section),
        "displayName": metric.partition("/")[2],
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "ignoreOutliers": False,
    }


def _pictures(samples: Sequence[str]) -> dict[str, Any]:
    card = _chart("pictures", "IMAGE", "pictures")
    return {**card, "imageKeys": list(samples), "step": 0, "showRunParams": False}


def _chart(uuid: str, kind: str, section: str) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "type": kind,
        "runsCountToCompare": 10,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
    }


def _sample_keys(client: MlflowClient, runs: Sequence[Run]) -> list[str]:
    """Prompts of the newest run that has pictures."""
    for run in runs:
        names = artifact_folder.of_run(client, run.info.run_id).names("images")
        keys = {unquote(name).partition("+step+")[0] for name in names}
        if keys:
            return sorted(key.replace("~", "/") for key in keys)
    return []


def _searched_params(runs: Sequence[Run]) -> list[str]:
    """Params in which the runs of the newest sweep differ."""
    sweep = runs[0].data.tags.get(SWEEP_TAG)
    return differing([run.data.params for run in runs if run.data.tags.get(SWEEP_TAG) == sweep])[
        :MAX_COLUMNS
    ]


def _packed(view: dict[str, Any]) -> str:
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(view).encode(), 9)).decode()

"""Features laid out in the plane, so that what lies together is alike."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from torch import Tensor

MOST = 1200
"""Points at most: beyond, every so-manieth image is taken."""
_SPREAD = 1e-6
"""Of unit features along any dimension, below which they are one point."""
_COMPONENTS = 50
"""Principal components that the layout is made from; the rest is left out to save time, as is usual."""


class Map(NamedTuple):
    """A layout."""

    points: np.ndarray
    """[P, 2] in [0, 1]."""
    chosen: np.ndarray
    """[P] positions in the image list."""
    how: str
    """For the caption."""


def layout(features: Tensor, *, quick: bool = False) -> Map:
    """UMAP of [N, D] features where umap-learn is installed, scikit-learn's t-SNE otherwise; N >= 5. The same for the same
    features on the same machine. ``quick`` takes t-SNE in any case: a process that has not used UMAP before waits some twenty
    seconds until it is compiled.

    Raises ``ValueError`` for features without any spread.
    """
    from sklearn.decomposition import PCA

    chosen = np.unique(np.linspace(0, len(features) - 1, min(len(features), MOST)).round().astype(np.int64))
    rows = features[chosen].float().cpu().numpy()
    if not np.ptp(rows, axis=0).max() > _SPREAD:  # both layouts divide by it, and t-SNE crashes the process then
        raise ValueError("the features of all images are the same: the network tells nothing apart")
    rows = PCA(min(_COMPONENTS, *rows.shape), random_state=0).fit_transform(rows)
    points, name = (None if quick else _umap(rows)) or _tsne(rows)
    low, high = np.quantile(points, [0.002, 0.998], axis=0)  # a straggler must not squeeze all others into a corner
    points = ((points - low) / np.maximum(high - low, 1e-9)).clip(0, 1)
    part = "" if len(chosen) == len(features) else f" of {len(chosen):,} of {len(features):,} images, evenly taken"
    return Map(points, chosen, f"{name}{part}, on {rows.shape[1]} principal components")


def _umap(rows: np.ndarray) -> tuple[np.ndarray, str] | None:
    try:
        import umap
    except ImportError:
        return None
    neighbors = min(15, len(rows) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a fixed seed means one thread, which is what we want
        made = umap.UMAP(n_neighbors=neighbors, min_dist=0.5, metric="cosine", init="pca", random_state=0).fit_transform(rows)
    return made, f"UMAP ({neighbors} neighbors, cosine)"


def _tsne(rows: np.ndarray) -> tuple[np.ndarray, str]:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(rows) - 1) / 3)
    with threadpool_limits(1):  # of so few points; on cores that others use too, its threads wait for each other by spinning
        made = TSNE(perplexity=perplexity, init="pca", metric="euclidean", random_state=0).fit_transform(rows)
    return made, f"t-SNE (perplexity {perplexity:g})"

"""Features and how they are evaluated: retrieval, kNN, linear probes, neighbours, attention maps."""

from engine.evaluation import attention_maps, features, linear, neighbours
from engine.evaluation.attention_maps import Attention
from engine.evaluation.evaluator import Candidate, Evaluator, check, evaluate_features, feature_name, keep, of_teacher, supported
from engine.evaluation.features import extract, of_run
from engine.evaluation.neighbours import ClassScore, Confusion, Neighbours, most_similar
from engine.evaluation.overlays import MAP_NAMES, overlay
from engine.evaluation.retrieval import Retrieval, retrieval

__all__ = [
    "MAP_NAMES",
    "Attention",
    "Candidate",
    "ClassScore",
    "Confusion",
    "Evaluator",
    "Neighbours",
    "Retrieval",
    "attention_maps",
    "check",
    "extract",
    "feature_name",
    "features",
    "evaluate_features",
    "keep",
    "linear",
    "most_similar",
    "neighbours",
    "of_run",
    "of_teacher",
    "overlay",
    "retrieval",
    "supported",
]

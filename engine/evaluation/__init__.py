"""Features and how they are evaluated: retrieval, kNN, linear probes, neighbours, attention maps."""

from engine.evaluation import attention_maps, features, linear, neighbours
from engine.evaluation.attention_maps import Attention
from engine.evaluation.evaluator import Candidate, Evaluator, check, evaluate_features, feature_name, keep, of_teacher, supported
from engine.evaluation.features import extract, of_run
from engine.evaluation.neighbours import ClassScore, Confusion, Neighbours, most_similar
from engine.evaluation.retrieval import Retrieval, retrieval
from engine.evaluation.validation import Validation, hold_out

__all__ = [
    "Attention",
    "Candidate",
    "ClassScore",
    "Confusion",
    "Evaluator",
    "Neighbours",
    "Retrieval",
    "Validation",
    "attention_maps",
    "check",
    "extract",
    "feature_name",
    "features",
    "evaluate_features",
    "hold_out",
    "keep",
    "linear",
    "most_similar",
    "neighbours",
    "of_run",
    "of_teacher",
    "retrieval",
    "supported",
]

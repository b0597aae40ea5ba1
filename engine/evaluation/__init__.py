"""Features and how they are evaluated: embeddings, retrieval, kNN, linear probes, neighbours, attention maps."""

from engine.evaluation import attention_maps, embedding_file, features, linear, neighbours
from engine.evaluation.attention_maps import Attention
from engine.evaluation.embed import description, embed_photos
from engine.evaluation.embedding_file import Embedding
from engine.evaluation.evaluator import Candidate, Evaluator, check, evaluate_features, feature_name, keep, of_teacher, supported
from engine.evaluation.features import extract, of_run
from engine.evaluation.neighbours import ClassScore, Confusion, Neighbours, most_similar
from engine.evaluation.overlays import MAP_NAMES, overlay
from engine.evaluation.query_gallery import evaluate_disjoint, evaluate_gallery, shared_photos
from engine.evaluation.retrieval import Matching, Retrieval, matching, retrieval
from engine.evaluation.source import HELP as SOURCE_HELP
from engine.evaluation.source import Source, add_best_option, open_source, split_overrides
from engine.evaluation.validation import Validation, hold_out

__all__ = [
    "MAP_NAMES",
    "Attention",
    "Candidate",
    "ClassScore",
    "Confusion",
    "Embedding",
    "Evaluator",
    "Matching",
    "Neighbours",
    "Retrieval",
    "SOURCE_HELP",
    "Source",
    "Validation",
    "add_best_option",
    "attention_maps",
    "check",
    "description",
    "embed_photos",
    "embedding_file",
    "evaluate_disjoint",
    "evaluate_gallery",
    "extract",
    "feature_name",
    "features",
    "evaluate_features",
    "hold_out",
    "keep",
    "linear",
    "matching",
    "most_similar",
    "neighbours",
    "of_run",
    "of_teacher",
    "open_source",
    "overlay",
    "retrieval",
    "shared_photos",
    "split_overrides",
    "supported",
]

"""Training, evaluation and prediction, from the command line on."""

from .checks import check_weights
from .classification import AccuracyEvaluator, ClassificationTrainer
from .command_line import command_line, main, setup
from .detection import Trainer
from .divergence import DivergedError
from .evaluator import DetectionEvaluator
from .prediction import Predictor
from .trainer import EVALUATION_FILE, BaseTrainer

__all__ = [
    "EVALUATION_FILE",
    "AccuracyEvaluator",
    "BaseTrainer",
    "ClassificationTrainer",
    "DetectionEvaluator",
    "DivergedError",
    "Predictor",
    "Trainer",
    "check_weights",
    "command_line",
    "main",
    "setup",
]

"""Cures for the formula of the loss.

Each takes a `Site` and returns its suggestions, none where it does not apply.
"""

from __future__ import annotations

from lightning_gradflow.advice.site import BY_HAND, NN, Site, paste, quote
from lightning_gradflow.findings import Suggestion


def stable_loss(site: Site) -> list[Suggestion]:
    """Losses that take logits."""
    del site  # the loss is no module of the model
    return [
        Suggestion(
            "Compute the loss from logits, and check the targets",
            "# in training_step; needs: from torch import nn\n"
            "assert target.isfinite().all()\n"
            "loss = nn.functional.cross_entropy(logits, target)  # or binary_cross_entropy_with_logits(logits, target)",
            "log(softmax(x)) and log(sigmoid(x)) overflow when computed in two steps; the joint form does not.",
            "Blanchard et al. 2021, Accurately computing the log-sum-exp and softmax functions",
        )
    ]


def scores_for_classes(site: Site) -> list[Suggestion]:
    """Scores, as they come out of the last layer, for a loss of classes."""
    del site  # the loss is no module of the model
    return [
        Suggestion(
            "Give cross_entropy the scores of the last layer, without a softmax",
            "# in training_step; needs: from torch import nn\n"
            "# take away the softmax at the end of the network, or keep it for predict_step\n"
            "loss = nn.functional.cross_entropy(scores, target)  # for probabilities: scores.softmax(-1)",
            "cross_entropy is nll_loss of log_softmax. After another softmax all scores lie in [0, 1], so no "
            "class gets a probability near 1, the loss stays far above 0, and a gradient passes through two softmaxes.",
            "Blanchard et al. 2021, Accurately computing the log-sum-exp and softmax functions",
        )
    ]


def scores_without_bounds(site: Site) -> list[Suggestion]:
    """Scores that may grow, for a loss of classes."""
    del site  # the loss is no module of the model
    return [
        Suggestion(
            "Give cross_entropy the scores of the last layer, without a sigmoid or tanh",
            "# in training_step; needs: from torch import nn\n"
            "# take away the sigmoid or tanh at the end of the network\n"
            "loss = nn.functional.cross_entropy(scores, target)  # for probabilities: scores.softmax(-1)",
            "A softmax of scores in [0, 1] gives one of ten classes at most 0.23, and of scores in [-1, 1] at most "
            "0.45. Where labels are not exclusive, use binary_cross_entropy_with_logits.",
            "Bridle 1990, Probabilistic interpretation of feedforward classification network outputs",
        )
    ]


def outputs_without_bounds(site: Site) -> list[Suggestion]:
    """Outputs that may be whatever the targets are."""
    code = [*NN, f"model.set_submodule({quote(site.end)}, nn.Identity())"] if site.end else []
    return [
        Suggestion(
            "Leave out the activation at the end of the network, or scale the targets into its bounds",
            paste(
                code,
                () if code else [f"{BY_HAND} in forward: return what the last layer gives, without the activation"],
            ),
            "A ReLU gives nothing below 0, a sigmoid what is between 0 and 1, a tanh between -1 and 1. Of targets "
            "beyond that the best that can be learnt is the bound, where no gradient comes through either. Where the "
            "bounds are meant, scale the targets to lie within them, in the dataset.",
            "Goodfellow et al. 2016, Deep learning, section 6.2.2, on linear units for Gaussian outputs",
        )
    ]


def scores_for_yes_or_no(site: Site) -> list[Suggestion]:
    """Scores for a loss of yes or no."""
    del site  # the loss is no module of the model
    return [
        Suggestion(
            "Give binary_cross_entropy_with_logits the scores of the last layer, without a sigmoid",
            "# in training_step; needs: from torch import nn\n"
            "# take away the sigmoid at the end of the network, or keep it for predict_step: scores.sigmoid()\n"
            "loss = nn.functional.binary_cross_entropy_with_logits(scores, target)",
            "After another sigmoid all scores lie in [0, 1]: no probability is below 0.5 or above 0.73.",
            "Blanchard et al. 2021, Accurately computing the log-sum-exp and softmax functions",
        )
    ]


def scale_targets(site: Site) -> list[Suggestion]:
    """Targets of size 1."""
    del site  # targets are no part of the model
    return [
        Suggestion(
            "Standardise the targets, and turn predictions back",
            "# in setup; y_train are the targets of the training set; needs: import torch\n"
            "self.target_mean, self.target_std = y_train.mean(0), y_train.std(0)\n\n"
            "# in training_step\n"
            "loss = torch.nn.functional.mse_loss(output, (target - self.target_mean) / self.target_std)\n\n"
            "# in predict_step\n"
            "prediction = output * self.target_std + self.target_mean",
            "A network starts with outputs of size 1, and takes steps that suit these. Of skewed targets, such as "
            "prices, take the logarithm first.",
            "LeCun et al. 1998, Efficient BackProp, section 4.5",
        )
    ]


def same_shape(site: Site) -> list[Suggestion]:
    """Outputs and targets of the same shape."""
    del site  # the loss is no module of the model
    return [
        Suggestion(
            "Give outputs and targets the same shape",
            "# in training_step; needs: from torch import nn\n"
            "loss = nn.functional.mse_loss(output.squeeze(-1), target.squeeze(-1))\n"
            "assert output.squeeze(-1).shape == target.squeeze(-1).shape",
            "(N, 1) less (N,) is (N, N), by the rules of broadcasting; the mean over it pulls every output to the mean "
            "of all targets.",
            "Harris et al. 2020, Array programming with NumPy",
        )
    ]

"""Perplexity from negative log-likelihoods, as a local module of the `evaluate` library.

    metric = evaluate.load("examples/metrics/perplexity")
    metric.add_batch(predictions=nll_sums, references=token_counts)
    metric.compute()

The usual perplexity metric loads a model by name and runs it on text. This one takes what a
training run has at hand: per sequence the summed negative log-likelihood in nats and the tokens it
is over.
"""
# One import a line: the import scanner of `evaluate` reads no other form.

import math

import datasets
import evaluate

_DESCRIPTION = "exp of the mean negative log-likelihood per predicted token"
_INPUTS = """
predictions: summed negative log-likelihood of each sequence, in nats (float)
references: number of predicted tokens of each sequence (int)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Perplexity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        tokens = sum(references)
        if tokens == 0:
            raise ValueError("expected at least one predicted token, got 0: give longer sequences")
        nll = math.fsum(predictions) / tokens
        return {
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "nll_per_token": nll,
            "tokens": tokens,
        }

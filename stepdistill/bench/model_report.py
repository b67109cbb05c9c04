"""The page of a comparison of language models or classifiers: one HTML file that needs neither a network nor a script."""

from __future__ import annotations

from .model_rows import ModelResults
from .report import facts, templates

TEMPLATE = "models.html.j2"


def model_page(results: ModelResults) -> str:
    """The page's text. The same results give the same text."""
    heads, rows = results.table()
    return (
        templates()
        .get_template(TEMPLATE)
        .render(
            title=f"{results.kind.capitalize()}s against their teacher",
            headlines=results.headlines(),
            heads=heads,
            rows=rows,
            legend=results.legend(),
            models=[(row.name, f"{row.path}, {row.architecture}, weights {row.weights}") for row in results.rows],
            protocol=list(facts(results.protocol)),
            environment=list(facts(results.environment)),
        )
    )

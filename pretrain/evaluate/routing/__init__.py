"""Routing analysis of a trained model: which tokens, words and patches each expert processes.

counts        counts over a set of pairs
words         words of the caption tokens
report        statistics of each layer and expert, as JSON values
grids         expert load and coactivation as matrices of ratios
text_table    the report as text
html_page     the report as HTML, with the grids as SVG (`svg`)
heatmap       the grids as an image
command       `vlmoe routing`
"""

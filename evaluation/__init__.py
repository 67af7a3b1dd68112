"""Scores: the measures of the field (`metrics`) and a run over fresh synthetic scenes (`scenes`)."""

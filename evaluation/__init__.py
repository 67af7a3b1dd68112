"""Scores: measures (`metrics`, `captions`), a run over any data set (`run`) and one over fresh scenes (`scenes`)."""

"""Tests of the two distributions as their users install them."""

"""Encrypted queries: a site computes on ciphertexts and never sees what was asked.

================  ==========================================================================
module            what it holds
================  ==========================================================================
`plans`           the two fixed parameter sets
`residues`        ciphertexts and keys between roles: bare residues, checked
`native`          the native library's messages, written by ourselves
`engine`          the native library's objects, and the way into them
`ckks_batch`      keys, encryption, evaluation, addition, decryption
`quadratic`       what is evaluated: a quadratic form
`polynomial`      degree-2 fits of activations
`layers`          what is taken out of a scikit-learn or torch model
`network`         the polynomial form of a model, with its measured fidelity
`flooding`        noise that covers the evaluation's own error
`documents`       wire forms
================  ==========================================================================

Linear models and networks with one hidden layer; see `network.EncryptedNetwork`.
"""

from __future__ import annotations

__all__: list[str] = []

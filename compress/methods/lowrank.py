import numpy as np


def rank_for_energy(moment, energy):
    v = np.linalg.eigvalsh(moment)[::-1].clip(0)
    return int(np.searchsorted(np.cumsum(v) / v.sum(), energy) + 1)


def factor(moment, rank):
    v, q = np.linalg.eigh(moment)
    q = q[:, ::-1][:, :rank]
    return q, q.T

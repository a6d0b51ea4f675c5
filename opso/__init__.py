"""OPSO: offline pretraining from states alone, then imitation of what was learned by inverse dynamics.

Goal-conditioned, with a sparse reward. A Mamba encoder turns states, or histories, into latents z. On them: what a move
is worth, Q(z, z', z_g); its expectile V(z, z_g) (IQL's idea, Kostrikov et al. 2021, arXiv 2110.06169, on moves in
place of actions, as in D3G, Edwards et al. 2020, arXiv 2002.09505); a proposer of the latent to be reached next; and
inverse dynamics, the only part that sees actions: those of a share f of the offline episodes (`opso`), or those of
its own episodes (`opso_online`), where the encoder is frozen. Data, tasks and protocol are OGBench's (Park et al.
2024, arXiv 2410.20092). There is no paper of OPSO and no published score; there is code. Where we differ from it:

  1. the expectile weighs under-estimates by tau_e, as it says of itself (the code's sign is the other way round)
  2. a goal is any state, drawn as OGBench draws them, reached when (x, y) is within the environment's tolerance; only
     that ends the bootstrap (there: a window's last state, reached where the recording ends)
  3. segments: every place of a segment trains, not the last one of a window; no padding, so nothing can leak from it
  4. one encoder call and one readout for training, goals and acting. A latent is of one state: a history tells where
     the recorded controller was heading, so values of histories are values of its way, not of the best one, and a
     policy of histories goes on as it went. With `history` acting sees the histories that were trained on
  5. the proposal lies K = 10 steps ahead (published: 1), but not behind the goal; proposals and actions are weighed by
     the advantage; half of the policy's goals are near
  6. the proposer sees the goal; inverse dynamics does not unless told to (`inverse_goal`): from recorded actions it
     gains by it, from its own it fails with it. A goal that V puts within K steps is moved to itself. Q values
     candidates (--select q)
  7. V learns from K recorded steps at once (`value_leap`), from Q of near goals alone: one step is worth less than
     V's errors are, and those became short cuts through walls. V begins pessimistic; the learning rate falls to 0
  8. InfoNCE does not count neighbours in time as wrong answers; alignment is for goals ahead in the episode alone

`nets` has the networks, `losses` the losses, `system` the agent of phase 1, `online` that of phase 2, `places` what
they learn from. Letters: B segments, T trained places, K steps ahead, L = T + K, N = B T, S state, A action, D
latent. Contract: common/interface.py.
"""

from opso.agent import GoalMemory, Opso

__all__ = ["GoalMemory", "Opso"]

"""One question a file, answered from recorded values or from a stream of them.

    router.py             which experts a token takes; drop, force, re-weight    Routing, drop, force, reweight
    specialisation.py     what an expert tells about a label                     Specialisation
    effect.py             what an edit changes, by label                         Effect
    needed.py             which labels need which expert                         Needed
    sinks.py              mass on sinks, resting heads; remove, zero, swap       Sinks, remove, zero, swap
    volume.py             a head as quiet as on average, without its sink        fixed_volume
    windows.py            how far back heads look                                Distances
    receptive_field.py    which positions can and do influence an output         ReceptiveField, reachable
    windowed.py           another window: which heads move                       windowed, Moved
    yarn.py               rotary planes; the model at a longer context           Planes, extended
    score_by_distance.py  a head's score by distance alone                       ScoreByDistance
    long_texts.py         loss and retrieval beyond the trained length           LossByPosition, Retrieval
    streaming.py          attention's quantities without the [s t] matrix        attention, Attended
    lens.py               the stream read layer by layer                         LogitLens, TunedLens
    attribution.py        a logit as the sum of what was written                 Attribution
    patching.py           another text's values put in; single paths             Patching, path_patching
    ablation.py           parts taken away; steering vectors                     ablated, Ablation, Part, steered
    heads.py              induction, previous-token, duplicate-token scores      HeadScores
    activity.py           clamps and sparsity inside experts; MXFP4's error      Activity, PackingError
    residual.py           growth of the stream, outlier dimensions               Growth
    channels.py           Harmony's channels as labels                           slices, mean_by
    sae.py                SAEs in SAELens's format                               SAE, replaced

Import what you need from its file: `from gptoss_lab.probes.router import Routing`.
"""

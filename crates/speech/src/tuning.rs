//! The optimisations of speech models beside those of all models.

use roofbench_core::optimize::{Optimization, Verdict, bytes, last_level_cache, ours_on_the_cpu};

use crate::models::{FeatureConfig, TILE};

/// Convolutions over the samples in tiles.
pub const TILED_FEATURES: Optimization = Optimization {
    name: "tiled-features",
    about: "the convolutions over the samples run tile by tile, all layers on one before the next; else layer by layer",
    rule: |machine, model| {
        if let Some(verdict) = ours_on_the_cpu(model) {
            return verdict;
        }
        if ["SpeechT5ForTextToSpeech", "SpeechT5HifiGan"].contains(&model.spec.class.as_str()) {
            return Verdict::impossible("it takes no samples");
        }
        let Ok(cfg) = FeatureConfig::from_spec(model.spec) else {
            return Verdict::impossible("its config has no convolutions over samples");
        };
        let (tile, cache) = ((cfg.widest() * TILE * size_of::<f32>()) as f64, last_level_cache(machine) as f64);
        let sizes = format!("the widest values of a tile of {TILE} frames take {}", bytes(tile));
        match cache {
            0.0 => Verdict::on(format!("{sizes}; the caches of this machine are not known")),
            _ if tile <= cache => Verdict::on(format!("{sizes} and stay in the last-level cache ({})", bytes(cache))),
            _ => Verdict::off(format!("{sizes}, more than the last-level cache ({})", bytes(cache))),
        }
    },
};

/// Decoding ahead of the model.
pub const OVERLAPPED_DECODING: Optimization = Optimization {
    name: "overlapped-decoding",
    about: "sound files are decoded, mixed and resampled on a thread of their own, ahead of the model; no part of a latency",
    rule: |machine, model| match machine.cpu.usable_threads.saturating_sub(model.threads) {
        0 => Verdict::off(format!("the model has all {} CPUs; the thread would take turns with it", model.threads)),
        spare => Verdict::on(format!("{spare} of {} CPUs are not the model's", machine.cpu.usable_threads)),
    },
};

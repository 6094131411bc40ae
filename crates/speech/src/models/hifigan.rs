//! HiFi-GAN: sound from spectra, by transposed convolutions with residual blocks of several reaches behind each.
//! Source: HiFi-GAN (arXiv:2010.05646). Mirrors `transformers.SpeechT5HifiGan`.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, PhaseCost};
use roofbench_core::inputs::Inputs;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_nn::activation::{Activation, Slope};
use roofbench_nn::conv::{Conv1d, Conv1dConfig, ConvTranspose1d, ConvTranspose1dConfig};
use roofbench_nn::kernels::isa;
use serde::Deserialize;

use super::activation_dtype;

/// The part of `config.json` that shapes the computation; field names are the file's own, and what it leaves out is as
/// `transformers.SpeechT5HifiGanConfig` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct HifiGanConfig {
    /// Bins of a spectrum.
    pub model_in_dim: usize,
    /// Channels before the first stage; each halves them.
    pub upsample_initial_channel: usize,
    /// How much each stage lengthens the sequence.
    pub upsample_rates: Vec<usize>,
    /// Taps of each stage.
    pub upsample_kernel_sizes: Vec<usize>,
    /// Taps of the blocks behind each stage.
    pub resblock_kernel_sizes: Vec<usize>,
    /// Dilations within each block.
    pub resblock_dilation_sizes: Vec<Vec<usize>>,
    /// What is left of negative values, but before the last convolution.
    pub leaky_relu_slope: f32,
    /// Spectra are normalised by the checkpoint's mean and scale.
    pub normalize_before: bool,
}

impl Default for HifiGanConfig {
    fn default() -> Self {
        Self {
            model_in_dim: 80,
            upsample_initial_channel: 512,
            upsample_rates: vec![4; 4],
            upsample_kernel_sizes: vec![8; 4],
            resblock_kernel_sizes: vec![3, 7, 11],
            resblock_dilation_sizes: vec![vec![1, 3, 5]; 3],
            leaky_relu_slope: 0.1,
            normalize_before: true,
        }
    }
}

/// Taps of the first and the last convolution.
const ENDS: usize = 7;

/// What is left of negative values before the last convolution: torch's own.
const LAST_SLOPE: Slope = Slope::new(0.01);

impl HifiGanConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        let same = |(field, len): (&str, usize), (other, wanted): (&str, usize)| match len == wanted && len > 0 {
            true => Ok(()),
            false => Err(config::invalid(field, format!("has {len} entries, {other} {wanted}"))),
        };
        let stages = ("upsample_rates", cfg.upsample_rates.len());
        same(("upsample_kernel_sizes", cfg.upsample_kernel_sizes.len()), stages)?;
        let blocks = ("resblock_kernel_sizes", cfg.resblock_kernel_sizes.len());
        same(("resblock_dilation_sizes", cfg.resblock_dilation_sizes.len()), blocks)?;
        let last = u32::try_from(stages.1).ok().and_then(|stages| cfg.upsample_initial_channel.checked_shr(stages));
        config::sizes(&[
            ("model_in_dim", cfg.model_in_dim),
            ("upsample_initial_channel", cfg.upsample_initial_channel),
            ("upsample_initial_channel", last.unwrap_or(0)),
        ])?;
        for (&rate, &kernel) in cfg.upsample_rates.iter().zip(&cfg.upsample_kernel_sizes) {
            config::sizes(&[("upsample_rates", rate), ("upsample_kernel_sizes", kernel)])?;
            if kernel < rate {
                let reason = format!("{kernel} is less than the rate {rate} of its stage");
                return Err(config::invalid("upsample_kernel_sizes", reason));
            }
        }
        for kernel in &cfg.resblock_kernel_sizes {
            config::sizes(&[("resblock_kernel_sizes", *kernel)])?;
            if kernel % 2 == 0 {
                let reason = format!("{kernel} is even, which would shorten the sequence");
                return Err(config::invalid("resblock_kernel_sizes", reason));
            }
        }
        for dilations in &cfg.resblock_dilation_sizes {
            config::sizes(&[("resblock_dilation_sizes", dilations.len())])?;
            for dilation in dilations {
                config::sizes(&[("resblock_dilation_sizes", *dilation)])?;
            }
        }
        config::not_negative(&[("leaky_relu_slope", cfg.leaky_relu_slope.into())])?;
        Ok(cfg)
    }

    fn leaky(&self) -> Activation {
        Activation::LeakyRelu(Slope::new(self.leaky_relu_slope))
    }

    fn channels(&self, stages: usize) -> usize {
        self.upsample_initial_channel >> stages
    }

    /// Steps cut off at both ends of a stage.
    fn cut(&self, stage: usize) -> usize {
        (self.upsample_kernel_sizes[stage] - self.upsample_rates[stage]) / 2
    }

    /// Steps behind a stage of so many before it.
    fn longer(&self, stage: usize, length: usize) -> usize {
        ((length - 1) * self.upsample_rates[stage] + self.upsample_kernel_sizes[stage])
            .saturating_sub(2 * self.cut(stage))
    }
}

/// Pairs of convolutions, the first of each dilated.
struct Block(Vec<[Conv1d; 2]>);

impl Block {
    fn load(channels: usize, kernel: usize, dilations: &[usize], vb: VarBuilder) -> Result<Self> {
        let conv = |dilation: usize, vb: VarBuilder| {
            let reach = (kernel - 1) / 2 * dilation;
            let config = Conv1dConfig { dilation, padding: (reach, reach), ..Conv1dConfig::new(kernel) };
            Conv1d::load(channels, channels, config, true, vb)
        };
        let pair = |(i, dilation): (usize, &usize)| {
            Ok([conv(*dilation, vb.pp("convs1").pp(i))?, conv(1, vb.pp("convs2").pp(i))?])
        };
        dilations.iter().enumerate().map(pair).collect::<Result<_>>().map(Self)
    }

    /// after(block(x) + sum), with `active` = leaky(x).
    fn forward(
        &self,
        x: &Tensor,
        active: &Tensor,
        sum: Option<&Tensor>,
        leaky: Activation,
        after: Activation,
    ) -> Result<Tensor> {
        let (mut x, mut active) = (x.clone(), active.clone());
        for (i, [dilated, plain]) in self.0.iter().enumerate() {
            let inner = dilated.forward_act(&active, leaky)?;
            if i + 1 < self.0.len() {
                x = plain.forward_add(&inner, &x, Activation::Identity)?;
                active = leaky.forward(&x)?;
                continue;
            }
            let residual = match sum {
                Some(sum) => {
                    roofbench_nn::cost::elementwise(x.elem_count(), 1);
                    (&x + sum)?
                }
                None => x,
            };
            return plain.forward_add(&inner, &residual, after);
        }
        Ok(x)
    }
}

/// A transposed convolution and the blocks behind it, whose sum is activated.
struct Stage {
    upsampler: ConvTranspose1d,
    blocks: Vec<Block>,
    after: Activation,
}

/// `SpeechT5HifiGan`.
pub struct HifiGan {
    cfg: HifiGanConfig,
    /// (bins) both
    mean: Tensor,
    scale: Tensor,
    conv_pre: Conv1d,
    stages: Vec<Stage>,
    conv_post: Conv1d,
    spec: ModelSpec,
    paths: BTreeMap<String, String>,
}

impl HifiGan {
    /// Loads the model of `spec`.
    ///
    /// # Errors
    /// As for [`HifiGanConfig::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = HifiGanConfig::from_spec(spec)?;
        let (stages, blocks) = (cfg.upsample_rates.len(), cfg.resblock_kernel_sizes.len());
        // The mean over the blocks behind a stage is a sum there: the division goes into the next weights, which a leaky
        // ReLU in between does not mind.
        let mean_of_blocks = |weight: Tensor| weight / blocks as f64;
        let config = Conv1dConfig { padding: (ENDS / 2, ENDS / 2), ..Conv1dConfig::new(ENDS) };
        let stage = |i: usize| {
            let (input, output) = (cfg.channels(i), cfg.channels(i + 1));
            let (kernel, stride) = (cfg.upsample_kernel_sizes[i], cfg.upsample_rates[i]);
            let upsampler = vb.pp("upsampler").pp(i);
            let weight = upsampler.get((input, output, kernel), "weight")?;
            let weight = if i == 0 { weight } else { mean_of_blocks(weight)? };
            let config = ConvTranspose1dConfig { padding: cfg.cut(i), ..ConvTranspose1dConfig::new(kernel, stride) };
            let sizes = cfg.resblock_kernel_sizes.iter().zip(&cfg.resblock_dilation_sizes).enumerate();
            let block = |(at, (kernel, dilations)): (usize, (&usize, &Vec<usize>))| {
                Block::load(output, *kernel, dilations, vb.pp("resblocks").pp(i * blocks + at))
            };
            Ok(Stage {
                upsampler: ConvTranspose1d::new(&weight, Some(&upsampler.get(output, "bias")?), config)?,
                blocks: sizes.map(block).collect::<Result<_>>()?,
                after: if i + 1 == stages { Activation::LeakyRelu(LAST_SLOPE) } else { cfg.leaky() },
            })
        };
        let (bins, last, post) = (cfg.model_in_dim, cfg.channels(stages), vb.pp("conv_post"));
        let weight = mean_of_blocks(post.get((1, last, ENDS), "weight")?)?;
        let dtype = activation_dtype(spec.dtype, &spec.device);
        Ok(Self {
            mean: vb.get(bins, "mean")?.to_dtype(dtype)?,
            scale: vb.get(bins, "scale")?.to_dtype(dtype)?,
            conv_pre: Conv1d::load(bins, cfg.upsample_initial_channel, config, true, vb.pp("conv_pre"))?,
            stages: (0..stages).map(stage).collect::<Result<_>>()?,
            conv_post: Conv1d::new(&weight, Some(&post.get(1, "bias")?), config)?,
            spec: spec.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    /// Bins of the spectra that it takes.
    pub(super) fn bins(&self) -> usize {
        self.cfg.model_in_dim
    }

    /// The sound of spectra (frames, bins), or of a batch of them, as the models before it give them.
    pub(super) fn sound(&self, spectra: &Tensor) -> Result<Tensor> {
        match spectra.rank() {
            2 => self.forward(&spectra.unsqueeze(0)?)?.squeeze(0),
            _ => self.forward(spectra),
        }
    }

    /// What it costs over spectra (batch, frames).
    pub(super) fn cost_of(&self, batch: usize, frames: usize) -> Cost {
        forward_cost(&self.cfg, batch, frames, self.spec.dtype.size_in_bytes() as u64)
    }

    /// (batch, frames, bins) -> (batch, samples)
    fn forward(&self, spectra: &Tensor) -> Result<Tensor> {
        let mut x = spectra.clone();
        if self.cfg.normalize_before {
            roofbench_nn::cost::elementwise(x.elem_count(), 2);
            x = x.broadcast_sub(&self.mean)?.broadcast_div(&self.scale)?;
        }
        let leaky = self.cfg.leaky();
        let mut active = self.conv_pre.forward_act(&x, leaky)?;
        for Stage { upsampler, blocks, after } in &self.stages {
            let x = upsampler.forward(&active)?;
            active = leaky.forward(&x)?;
            let mut sum: Option<Tensor> = None;
            for (i, block) in blocks.iter().enumerate() {
                let after = if i + 1 == blocks.len() { *after } else { Activation::Identity };
                sum = Some(block.forward(&x, &active, sum.as_ref(), leaky, after)?);
            }
            active = sum.unwrap_or(x);
        }
        self.conv_post.forward_act(&active, Activation::Tanh)?.squeeze(2)
    }

    /// The spectra of a call as a batch, and whether they came as one.
    fn spectra(&self, call: &Call) -> Result<(Tensor, bool), SessionError> {
        let (name, bins) = ("spectrogram", self.cfg.model_in_dim);
        let inputs = Inputs::forward(call, &[name], &[])?;
        let one = inputs.optional(name).is_some_and(|tensor| tensor.rank() == 2);
        let shape = [("batch", None), ("frames", None), ("bins", Some(bins))];
        let spectra = inputs.floats_of(name, &shape[usize::from(one)..])?;
        let batch = if one { spectra.unsqueeze(0)? } else { spectra.clone() };
        let dtype = activation_dtype(self.spec.dtype, &self.spec.device);
        Ok((batch.to_device(&self.spec.device)?.to_dtype(dtype)?, !one))
    }
}

impl Session for HifiGan {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (spectra, batched) = self.spectra(call)?;
        let sound = self.forward(&spectra)?;
        observer.end(Phase::Forward);
        let sound = if batched { sound } else { sound.squeeze(0)? };
        Ok(Tensors::from([("waveform".to_owned(), sound)]))
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (batch, frames, _) = self.spectra(call)?.0.dims3()?;
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost: self.cost_of(batch, frames) }])
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of spectra (batch, frames).
fn forward_cost(cfg: &HifiGanConfig, batch: usize, frames: usize, bytes: u64) -> Cost {
    let conv = |[input, output, kernel]: [usize; 3], length: usize| {
        let conv = cost::Conv2d {
            batch: batch as u64,
            in_channels: input as u64,
            out_channels: output as u64,
            kernel: [1, kernel as u64],
            groups: 1,
            output: [1, length as u64],
            bias: true,
        };
        conv.cost(bytes)
    };
    let elements = |channels: usize, length: usize| (batch * channels * length) as u64;
    let (bins, first) = (cfg.model_in_dim, cfg.upsample_initial_channel);
    let mut cost = cost::input(elements(bins, frames), bytes);
    if cfg.normalize_before {
        // subtract, divide
        cost += cost::elementwise(elements(bins, frames), 2)
            + Cost { weight_bytes: 2 * bins as u64 * bytes, ..Cost::default() };
    }
    cost += conv([bins, first, ENDS], frames) + cost::elementwise(elements(first, frames), 1);
    let mut length = frames;
    for (stage, kernel) in cfg.upsample_kernel_sizes.iter().enumerate() {
        let (input, output, longer) = (cfg.channels(stage), cfg.channels(stage + 1), cfg.longer(stage, length));
        let one = cost::elementwise(elements(output, longer), 1);
        // each step goes to every tap, also to those that are cut off
        cost += Cost {
            flops: 2 * elements(input, length) * (kernel * output) as u64 + elements(output, longer),
            weight_bytes: ((input * kernel + 1) * output) as u64 * bytes,
            activation_bytes: elements(output, longer) * bytes,
            kv_bytes: 0,
        };
        cost += one; // activation
        for (at, (kernel, dilations)) in cfg.resblock_kernel_sizes.iter().zip(&cfg.resblock_dilation_sizes).enumerate()
        {
            let pair = conv([output, output, *kernel], longer) * 2 + one * 2; // activation between, residual
            // activations between pairs, the sum with the blocks before
            cost += pair * dilations.len() as u64 + one * (dilations.len() as u64 - 1 + u64::from(at > 0));
        }
        cost += one; // activation of the sum
        length = longer;
    }
    let last = cfg.channels(cfg.upsample_rates.len());
    cost + conv([last, 1, ENDS], length) + cost::elementwise(elements(1, length), 1)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::Weights;
    use serde_json::{Value, json};

    use super::*;
    use crate::Source;

    fn spec(config: Value) -> ModelSpec {
        ModelSpec::new("speecht5", "SpeechT5HifiGan", config)
    }

    fn tiny() -> ModelSpec {
        spec(json!({
            "model_in_dim": 3, "upsample_initial_channel": 4, "upsample_rates": [2], "upsample_kernel_sizes": [4],
            "resblock_kernel_sizes": [3, 1], "resblock_dilation_sizes": [[1, 2], [1]],
        }))
    }

    #[test]
    fn one_spectrum_is_a_batch_of_one() -> Result<(), SessionError> {
        let spec = tiny();
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, &[], &spec.class, &Default::default())?;
        let mut model = HifiGan::load(&spec, weights.var_builder(DType::F32, &Device::Cpu))?;
        let spectra = Tensor::randn(0f32, 1.0, (1, 5, 3), &Device::Cpu)?;
        let mut run = |spectra: Tensor| {
            let inputs = [("spectrogram".to_owned(), spectra)].into();
            let call = Call { method: "forward".into(), inputs, ..Default::default() };
            model.call(&call, &mut Unobserved).map(|outputs| outputs["waveform"].clone())
        };
        let batch = run(spectra.clone())?;
        assert_eq!(batch.dims(), [1, 10]);
        assert_eq!(run(spectra.squeeze(0)?)?.to_vec1::<f32>()?, batch.squeeze(0)?.to_vec1::<f32>()?);
        assert!(run(spectra.narrow(2, 0, 2)?).is_err_and(|error| error.to_string().contains("bins = 3")));
        Ok(())
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() -> Result<(), SessionError> {
        let conv = |steps: u64, input: u64, output: u64, kernel: u64| steps * output * (2 * input * kernel + 1);
        let whole = 2 * 5 * 3 + conv(5, 3, 4, 7) + 5 * 4 // normalised, first convolution, activation
            + 2 * 5 * 4 * 4 * 2 + 10 * 2 + 10 * 2 // up, bias, activation
            + 4 * conv(10, 2, 2, 3) + 4 * 20 + 20 // two pairs, an activation between
            + 2 * conv(10, 2, 2, 1) + 2 * 20 + 20 // one pair, the sum
            + 20 + conv(10, 2, 1, 7) + 10;
        assert_eq!(forward_cost(&HifiGanConfig::from_spec(&tiny())?, 1, 5, 4).flops, whole);
        // published: 12.7 million parameters
        let cfg = HifiGanConfig::from_spec(&spec(json!({})))?;
        assert_eq!(forward_cost(&cfg, 1, 100, 4).weight_bytes, 4 * (12_656_257 + 2 * 80));
        Ok(())
    }

    #[test]
    fn malformed_configs_name_the_field() {
        let message = |config: Value| HifiGanConfig::from_spec(&spec(config)).err().map(|e| e.to_string());
        for (config, field) in [
            (json!({"upsample_rates": [4]}), "`upsample_kernel_sizes`: has 4 entries, upsample_rates 1"),
            (json!({"upsample_rates": [4, 4, 4, 9]}), "`upsample_kernel_sizes`: 8 is less than the rate 9"),
            (json!({"resblock_kernel_sizes": [3, 7, 10]}), "`resblock_kernel_sizes`: 10 is even"),
            (json!({"resblock_dilation_sizes": [[1]]}), "`resblock_dilation_sizes`: has 1 entries"),
            (json!({"upsample_initial_channel": 8}), "`upsample_initial_channel`: 0"),
            (json!({"leaky_relu_slope": -0.1}), "`leaky_relu_slope`"),
        ] {
            let found = message(config);
            assert!(found.as_ref().is_some_and(|found| found.contains(field)), "{found:?}, not {field}");
        }
    }
}

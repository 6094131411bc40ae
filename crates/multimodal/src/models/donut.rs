//! Donut: a Swin Transformer over the page, and a decoder of MBart that reads it into text.
//! Source: Donut (arXiv:2111.15664). Mirrors `transformers.VisionEncoderDecoderModel` of `DonutSwinModel` and
//! `MBartForCausalLM`.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost};
use roofbench_core::inputs::Inputs;
use roofbench_core::session::{Call, ModelSpec, Result, Session, SessionError};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::linear::Linear;
use roofbench_text::models::bart::{BartConfig, BartDecoder};
use roofbench_text::seq2seq::CrossDecoder;
use roofbench_vision::models::swin::{self, Layout, SwinConfig, SwinEncoder};
use roofbench_vision::models::{HeightWidth, activation_dtype};
use serde_json::Value;

use super::distinct::Distinct;
use crate::picture_to_text::{PictureToText, PictureToTextSession};

/// The classes that run.
pub const CLASSES: &[&str] = &["VisionEncoderDecoderModel"];

/// Names in published checkpoints. The first is for a tied output matrix.
const RULES: &[AliasRule] = &[
    AliasRule::rename(r"^decoder\.lm_head\.weight$", "decoder.model.decoder.embed_tokens.weight", AliasScope::Always),
    // buffers of windows, which follow from their size, and of the original implementation
    AliasRule::drop(r"\.relative_position_index$|\.attn_mask$", AliasScope::Always),
];

/// How published checkpoints name the tensors of `spec`.
pub(crate) fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    if ties_output(spec) { RULES } else { &RULES[1..] }
}

/// The decoder's config says so; the outer one always says no.
fn ties_output(spec: &ModelSpec) -> bool {
    spec.config.pointer("/decoder/tie_word_embeddings") != Some(&false.into())
}

/// The configs of both halves.
#[derive(Debug, Clone)]
pub struct DonutConfig {
    /// The page's half.
    pub encoder: SwinConfig,
    /// The text's half.
    pub decoder: BartConfig,
    /// The output matrix is that of the embeddings.
    pub ties_output: bool,
}

impl DonutConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let encoder = config::nested(spec, "encoder", |part| {
            config::refuse_unless(part, "model_type", &["donut-swin".into()])?;
            // the library adds a row for a class token that is not there, and fails
            config::refuse_unless(part, "use_absolute_embeddings", &[false.into()])?;
            SwinConfig::from_spec(part)
        })?;
        let decoder = config::nested(spec, "decoder", |part| {
            config::refuse_unless(part, "model_type", &["mbart".into()])?;
            config::refuse_unless(part, "cross_attention_hidden_size", &[Value::Null])?;
            BartConfig::mbart_decoder(part)
        })?;
        Ok(Self { encoder, decoder, ties_output: ties_output(spec) })
    }

    /// Widths of the two halves, where they differ and states are projected.
    fn projection(&self) -> Option<[usize; 2]> {
        let widths = [self.encoder.features(), self.decoder.d_model];
        (widths[0] != widths[1]).then_some(widths)
    }
}

/// `VisionEncoderDecoderModel`.
pub struct DonutModel {
    cfg: DonutConfig,
    encoder: SwinEncoder,
    enc_to_dec_proj: Option<Linear>,
    decoder: BartDecoder,
    dtype: DType,
    device: Device,
}

impl DonutModel {
    /// Loads the model of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// As for [`DonutConfig::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = DonutConfig::from_spec(spec)?;
        let (vocab, hidden, part) = (cfg.decoder.vocab_size, cfg.decoder.d_model, vb.pp("decoder"));
        let text = part.pp("model.decoder");
        let (embed_tokens, lm_head) = match cfg.ties_output {
            true => Embedding::load_tied(vocab, hidden, text.pp("embed_tokens"))?,
            false => (
                Embedding::load(vocab, hidden, text.pp("embed_tokens"))?,
                Linear::load(hidden, vocab, false, part.pp("lm_head"))?,
            ),
        };
        let project = |[from, to]: [usize; 2]| Linear::load(from, to, true, vb.pp("enc_to_dec_proj"));
        Ok(Self {
            encoder: SwinEncoder::load(&cfg.encoder, false, vb.pp("encoder"))?,
            enc_to_dec_proj: cfg.projection().map(project).transpose()?,
            decoder: BartDecoder::load(&cfg.decoder, embed_tokens, lm_head, text)?,
            dtype: spec.dtype,
            device: spec.device.clone(),
            cfg,
        })
    }

    /// The model behind the calls of its class.
    pub(crate) fn session(spec: &ModelSpec, vb: VarBuilder) -> Result<Box<dyn Session>, SessionError> {
        Ok(Box::new(PictureToTextSession::new(Self::load(spec, vb)?, spec)))
    }
}

/// Pages of one size.
pub(crate) struct Pages {
    /// (batch, channels, height, width)
    distinct: Distinct,
    /// Items of the batch.
    batch: usize,
    layout: Layout,
}

impl PictureToText for DonutModel {
    type Decoder = BartDecoder;
    type Pictures = Pages;

    const INPUTS: &'static [&'static str] = &["pixel_values"];

    /// A prompt names the task, and stands for the start token.
    const STARTS_PROMPTS: bool = false;

    fn decoder(&self) -> &BartDecoder {
        &self.decoder
    }

    fn read(&self, call: &Call) -> Result<Pages, SessionError> {
        let inputs = Inputs::of_any_method(call, &["pixel_values", "decoder_input_ids", "decoder_attention_mask"])?;
        let values = inputs.pictures("pixel_values", self.cfg.encoder.num_channels)?;
        let (batch, _, height, width) = values.dims4()?;
        let layout = self.cfg.encoder.layout(HeightWidth { height, width }, false)?;
        Ok(Pages { distinct: Distinct::of(values)?, batch, layout })
    }

    fn shape(pages: &Pages) -> [usize; 2] {
        [pages.batch, pages.layout.last_grid().into_iter().product()]
    }

    fn encode(&self, pages: &Pages) -> Result<(Tensor, Encoded), SessionError> {
        let dtype = activation_dtype(self.dtype, &self.device);
        let values = pages.distinct.values().to_device(&self.device)?.to_dtype(dtype)?;
        let states = self.encoder.forward(&values, &pages.layout, None)?; // (pages, patches, features)
        let states = pages.distinct.spread(states)?; // (batch, patches, features)
        let projected = match &self.enc_to_dec_proj {
            Some(projection) => projection.forward(&states)?,
            None => states.clone(),
        };
        Ok((states, Encoded::new(projected, None, self.decoder.shape().layers)?))
    }

    fn encoder_cost(&self, pages: &Pages) -> Cost {
        let ([batch, states], bytes) = (Self::shape(pages).map(|n| n as u64), self.dtype.size_in_bytes() as u64);
        let projection = self.cfg.projection().map_or(Cost::default(), |widths| {
            let [from, to] = widths.map(|width| width as u64);
            cost::linear(batch * states, from, to, true, bytes)
        });
        swin::encoder_cost(&self.cfg.encoder, pages.distinct.count() as u64, &pages.layout, self.dtype) + projection
    }
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::{Tensors, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::json;

    use super::*;

    fn spec(config: Value) -> ModelSpec {
        ModelSpec::new("donut", "VisionEncoderDecoderModel", config)
    }

    fn tiny() -> Value {
        json!({
            "decoder_start_token_id": 2, "eos_token_id": 2,
            "encoder": {
                "model_type": "donut-swin", "patch_size": 2, "embed_dim": 4, "depths": [1], "num_heads": [2],
                "window_size": 2, "mlp_ratio": 2.0,
            },
            "decoder": {
                "model_type": "mbart", "vocab_size": 10, "d_model": 6, "decoder_layers": 1,
                "decoder_attention_heads": 3, "decoder_ffn_dim": 5, "max_position_embeddings": 6,
            },
        })
    }

    fn session(config: Value) -> Result<Box<dyn Session>, SessionError> {
        let spec = spec(config);
        let weights =
            Weights::open(&Source::Synthetic { seed: 0 }, aliases(&spec), &spec.class, &HubOptions::default())?;
        DonutModel::session(&spec, weights.var_builder(spec.dtype, &spec.device))
    }

    fn call(method: &str, pixels: [usize; 4], ids: &[[i64; 2]]) -> Call {
        let values = Tensor::ones(&pixels, DType::F32, &Device::Cpu).expect("pixels");
        let ids = Tensor::from_vec(ids.concat(), (ids.len(), 2), &Device::Cpu).expect("ids");
        let inputs = Tensors::from([("pixel_values".into(), values), ("decoder_input_ids".into(), ids)]);
        Call { method: method.into(), inputs, ..Call::default() }
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() -> Result<(), SessionError> {
        // a page of 4 patches in one window, 4 wide with 2 heads of 2; two tokens, 6 wide with 3 heads of 2
        let product = |rows: u64, from: u64, to: u64| 2 * rows * from * to + rows * to;
        let encoder = product(4, 12, 4) + 7 * 16 // patches of 12 numbers, normalised
            + 7 * 16 + product(4, 4, 12) + 2 * 16 * (4 * 2 + 5) + product(4, 4, 4) + 16
            + 7 * 16 + product(4, 4, 8) + 32 + product(4, 8, 4) + 16
            + product(4, 4, 6); // states as wide as the decoder
        let decoder = 12 + 7 * 12 // positions added, normalised
            + 7 * 12 + product(2, 6, 18) + 3 * 3 * (4 * 2 + 5) + product(2, 6, 6) + 12
            + 7 * 12 + product(2, 6, 6) + product(4, 6, 12) + 3 * 8 * (4 * 2 + 5) + product(2, 6, 6) + 12
            + 7 * 12 + product(2, 6, 5) + 10 + product(2, 5, 6) + 12
            + 7 * 12 + 2 * 2 * 6 * 10; // the output matrix has no bias
        let (mut session, call) = (session(tiny())?, call("forward", [1, 3, 4, 4], &[[2, 5]]));
        let (outputs, recorded) = roofbench_nn::cost::record(|| session.call(&call, &mut Unobserved));
        let outputs = outputs?;
        assert_eq!(outputs["encoder_last_hidden_state"].dims(), [1, 4, 4]);
        assert_eq!(outputs["logits"].dims(), [1, 2, 10]);
        let flops: Vec<u64> = session.cost(&call)?.iter().map(|phase| phase.cost.flops).collect();
        assert_eq!(flops, [encoder, decoder]);
        assert_eq!(recorded.flops, encoder + decoder);
        Ok(())
    }

    #[test]
    fn a_prompt_stands_for_the_start_token() -> Result<(), SessionError> {
        let mut call = call("generate", [1, 3, 4, 4], &[[5, 7]]);
        call.arguments = [("max_new_tokens".to_owned(), json!(1))].into_iter().collect();
        let mut session = session(tiny())?;
        let mut sequence = |call: &Call| {
            let outputs = session.call(call, &mut Unobserved)?;
            Ok::<_, SessionError>(outputs["sequences"].to_vec2::<i64>()?.concat())
        };
        assert_eq!(sequence(&call)?[..2], [5, 7]);
        call.inputs.remove("decoder_input_ids");
        assert_eq!(sequence(&call)?[0], 2);
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_named() -> Result<(), SessionError> {
        for (part, field, value, start) in [
            ("encoder", "model_type", json!("vit"), "`encoder.model_type` = \"vit\" is not supported"),
            ("encoder", "use_absolute_embeddings", json!(true), "`encoder.use_absolute_embeddings` = true"),
            ("encoder", "num_heads", json!([3]), "`encoder.num_heads`: 3 does not divide 4"),
            ("decoder", "model_type", json!("bert"), "`decoder.model_type` = \"bert\" is not supported"),
            ("decoder", "d_model", json!(7), "`decoder.d_model`: 7 is not a multiple of"),
            ("decoder", "cross_attention_hidden_size", json!(4), "`decoder.cross_attention_hidden_size` = 4"),
        ] {
            let mut config = tiny();
            config[part][field] = value;
            let found = session(config).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(found.starts_with(&format!("config.json: {start}")), "{found}");
        }
        let mut session = session(tiny())?;
        let mut message =
            |call: &Call| session.call(call, &mut Unobserved).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message(&call("forward", [1, 3, 2, 2], &[[2, 5]])).contains("give larger pictures"));
        assert!(message(&call("forward", [2, 3, 4, 4], &[[2, 5]])).contains("1 sequences, pixel_values hold 2"));
        assert!(message(&call("forward", [1, 3, 4, 4], &[[2, 10]])).contains("beyond vocab_size = 10"));
        let mut missing = call("forward", [1, 3, 4, 4], &[[2, 5]]);
        missing.inputs.remove("decoder_input_ids");
        assert!(message(&missing).contains("`decoder_input_ids`: is missing"));
        Ok(())
    }
}

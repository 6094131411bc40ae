//! Language models that read features of pictures among their tokens: the decoders and encoder-decoders of the text crate
//! from embeddings on, as LLaVA, BLIP-2 and InstructBLIP have them.

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::PhaseCost;
use roofbench_core::generation::Generation;
use roofbench_core::inputs::Inputs;
use roofbench_core::session::{Call, ModelSpec, Observer, Result, SessionError, Tensors};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::decoding::Decoding;
use roofbench_text::causal::{self, CausalLm, Pass};
use roofbench_text::models::llama::{LlamaConfig, LlamaModel};
use roofbench_text::models::mistral;
use roofbench_text::models::opt::{OptConfig, OptModel};
use roofbench_text::models::t5::{T5Config, T5Model};
use roofbench_text::seq2seq::{self, CrossDecoder, Seq2SeqLm};
use serde_json::Value;

use super::forward_phase;

/// `text_config`, by its `model_type`.
#[derive(Debug, Clone)]
pub enum TextConfig {
    /// `llama` and `mistral`.
    Llama(LlamaConfig),
    /// `opt`.
    Opt(OptConfig),
    /// `t5`.
    T5(T5Config),
}

impl TextConfig {
    /// Reads `text_config` of `spec`, whose `model_type` is one of `supported`; the first of them where it is absent.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec, supported: &[&str]) -> Result<Self, SessionError> {
        config::nested(spec, "text_config", |spec| {
            let values: Vec<Value> = supported.iter().map(|name| Value::from(*name)).collect();
            config::refuse_unless(spec, "model_type", &values)?;
            match spec.config.get("model_type").and_then(Value::as_str).or(supported.first().copied()) {
                Some("mistral") => mistral::config(spec).map(Self::Llama),
                Some("opt") => Self::opt(spec),
                Some("t5") => T5Config::from_spec(spec).map(Self::T5),
                _ => LlamaConfig::from_spec(&with_llama_sizes(spec)).map(Self::Llama),
            }
        })
    }

    fn opt(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg = OptConfig::from_spec(spec)?;
        let (embeddings, states) = (cfg.embedding_width(), cfg.hidden_size);
        if embeddings != states {
            let reason = format!("is {embeddings}, and features of pictures are as wide as hidden_size, {states}");
            return Err(config::invalid("word_embed_proj_dim", reason));
        }
        Ok(Self::Opt(cfg))
    }

    /// Width of its embeddings.
    pub fn width(&self) -> usize {
        match self {
            Self::Llama(cfg) => cfg.hidden_size,
            Self::Opt(cfg) => cfg.hidden_size,
            Self::T5(cfg) => cfg.d_model,
        }
    }

    /// Token ids that the class has where config.json leaves them out.
    fn tokens(&self) -> &'static [(&'static str, i64)] {
        match self {
            Self::Llama(_) => &[("bos_token_id", 1), ("eos_token_id", 2)],
            Self::Opt(_) => &[("bos_token_id", 2), ("eos_token_id", 2), ("pad_token_id", 1)],
            Self::T5(_) => &[("pad_token_id", 0), ("eos_token_id", 1)],
        }
    }

    /// `text_config` of `spec` with the token ids of the class where it has none.
    pub fn with_tokens(&self, spec: &ModelSpec) -> Value {
        let mut fields = spec.config.get("text_config").and_then(Value::as_object).cloned().unwrap_or_default();
        for (name, id) in self.tokens() {
            fields.entry(*name).or_insert_with(|| (*id).into());
        }
        Value::Object(fields)
    }
}

/// `spec` with what `transformers.LlamaConfig` has for sizes, which LLaVA's config.json leaves out.
fn with_llama_sizes(spec: &ModelSpec) -> ModelSpec {
    let sizes = [
        ("vocab_size", 32_000.into()),
        ("hidden_size", 4096.into()),
        ("intermediate_size", 11_008.into()),
        ("num_hidden_layers", 32.into()),
        ("num_attention_heads", 32.into()),
    ];
    config::with_defaults(spec, &sizes)
}

/// The tokens of a call, checked.
pub struct Prompt {
    /// (batch, seq), i64.
    pub input_ids: Tensor,
    /// (batch, seq) of 0 and 1.
    pub attention_mask: Option<Tensor>,
    /// (batch, seq), where the call has its own.
    pub position_ids: Option<Tensor>,
    /// (batch, decoder's seq), of an encoder-decoder.
    pub decoder_input_ids: Option<Tensor>,
    /// (batch, decoder's seq) of 0 and 1.
    pub decoder_attention_mask: Option<Tensor>,
}

impl Prompt {
    /// `input_ids` alone, all of which exist.
    pub fn of(input_ids: Tensor) -> Self {
        let (attention_mask, position_ids, decoder_input_ids, decoder_attention_mask) = (None, None, None, None);
        Self { input_ids, attention_mask, position_ids, decoder_input_ids, decoder_attention_mask }
    }

    /// Sequences, and tokens of each.
    fn shape(&self) -> [u64; 2] {
        [0, 1].map(|axis| self.input_ids.dims()[axis] as u64)
    }

    /// Checks that `token` stands in `features` places, as many as there are features of pictures.
    ///
    /// # Errors
    /// Names both numbers.
    pub fn check_places(&self, token: i64, features: u64) -> Result<(), SessionError> {
        let ids = self.input_ids.flatten_all()?.to_vec1::<i64>()?;
        match ids.iter().filter(|id| **id == token).count() as u64 {
            places if places == features => Ok(()),
            places => {
                let reason =
                    format!("holds the image token {token} {places} times, pixel_values give {features} features");
                Err(SessionError::input("input_ids", reason))
            }
        }
    }

    /// `embeddings` (batch, seq, width) of the tokens, with `features` (features, width) in the places of `token`, one
    /// after the other.
    ///
    /// # Errors
    /// When there are fewer than places.
    pub fn put(&self, embeddings: &Tensor, token: i64, features: &Tensor) -> Result<Tensor> {
        let (rows, ids) = (embeddings.flatten_to(1)?, self.input_ids.flatten_all()?.to_vec1::<i64>()?);
        let (mut row, mut feature, mut parts) = (0, 0, Vec::new());
        for run in ids.chunk_by(|a, b| (*a == token) == (*b == token)) {
            if run.first() == Some(&token) {
                parts.push(features.narrow(0, feature, run.len())?);
                feature += run.len();
            } else {
                parts.push(rows.narrow(0, row, run.len())?);
            }
            row += run.len();
        }
        Tensor::cat(&parts, 0)?.reshape(embeddings.shape())
    }
}

/// A language model behind embeddings.
pub enum LanguageModel {
    /// Reads and writes.
    Decoder(Box<dyn CausalLm>),
    /// Reads with its encoder.
    EncoderDecoder(Box<T5Model>),
}

impl LanguageModel {
    /// Reads the model of `cfg` at `vb`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &TextConfig, vb: VarBuilder) -> Result<Self, SessionError> {
        Ok(match cfg {
            TextConfig::Llama(cfg) => Self::Decoder(Box::new(LlamaModel::with_config(cfg.clone(), vb)?)),
            TextConfig::Opt(cfg) => Self::Decoder(Box::new(OptModel::with_config(cfg.clone(), vb)?)),
            TextConfig::T5(cfg) => Self::EncoderDecoder(Box::new(T5Model::with_config(cfg, vb)?)),
        })
    }

    /// Reads the tokens of a call, of which `inputs` admits those that its class has; `None` without `input_ids`.
    ///
    /// # Errors
    /// Names the argument that does not fit.
    pub fn read(&self, inputs: &Inputs) -> Result<Option<Prompt>, SessionError> {
        if inputs.optional_matrix("input_ids")?.is_none() {
            return match inputs.optional_matrix("attention_mask")? {
                None => Ok(None),
                Some(_) => Err(SessionError::input("attention_mask", "goes with input_ids, which are missing")),
            };
        }
        let vocab_size = match self {
            Self::Decoder(model) => model.shape().vocab_size,
            Self::EncoderDecoder(model) => model.decoder().shape().vocab_size,
        };
        let (input_ids, attention_mask) = seq2seq::source(inputs, vocab_size)?;
        let (decoder_input_ids, decoder_attention_mask) =
            seq2seq::decoder_inputs(inputs, ("input_ids", input_ids.dim(0)?), vocab_size)?;
        if let (Self::Decoder(_), Some(_)) = (self, &decoder_input_ids) {
            return Err(SessionError::input("decoder_input_ids", "is for a language model with an encoder alone"));
        }
        let position_ids = inputs.matrix_like("position_ids", &input_ids)?;
        Ok(Some(Prompt { input_ids, attention_mask, position_ids, decoder_input_ids, decoder_attention_mask }))
    }

    /// How tokens are chosen behind `prompt`; `own` are arguments that the class reads by itself.
    ///
    /// # Errors
    /// As for [`Generation::read`].
    pub fn generation(
        &self,
        spec: &ModelSpec,
        call: &Call,
        prompt: &Prompt,
        own: &[&str],
    ) -> Result<Generation, SessionError> {
        let length = match self {
            Self::Decoder(_) => prompt.input_ids.dim(1)?,
            Self::EncoderDecoder(_) => 1, // the start token
        };
        Generation::read(spec, call, length, own)
    }

    /// The embeddings of tokens, (batch, seq) → (batch, seq, width).
    ///
    /// # Errors
    /// Candle's.
    pub fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Decoder(model) => model.embed(input_ids),
            Self::EncoderDecoder(model) => model.decoder().embed(input_ids),
        }
    }

    fn encode(model: &T5Model, prompt: &Prompt, x: Tensor) -> Result<Encoded> {
        let mask = prompt.attention_mask.as_ref();
        Encoded::new(model.encoder().forward(x, mask)?, mask, model.decoder().shape().layers)
    }

    /// Scores of every token behind each, from the rows `x` in the places of `prompt`.
    ///
    /// # Shapes
    /// (batch, seq, width) → (batch, seq, vocab); of an encoder-decoder (batch, decoder's seq, vocab).
    ///
    /// # Errors
    /// Too long a sequence; a prompt without tokens for the decoder that there is.
    pub fn forward(&self, prompt: &Prompt, x: Tensor) -> Result<Tensor, SessionError> {
        match self {
            Self::Decoder(model) => {
                let (batch, seq, _) = x.dims3()?;
                model.shape().check_length("input_ids", seq)?;
                let mut decoding = Decoding::once(batch, seq, prompt.attention_mask.as_ref(), x.device())?;
                if let Some(position_ids) = &prompt.position_ids {
                    decoding = decoding.with_positions(position_ids)?;
                }
                Ok(model.logits(&model.decode(x, &mut decoding)?)?)
            }
            Self::EncoderDecoder(model) => {
                let (ids, mask) = (decoder_input_ids(prompt)?, prompt.decoder_attention_mask.as_ref());
                seq2seq::forward(model.decoder(), ids, mask, &mut Self::encode(model, prompt, x)?)
            }
        }
    }

    /// Tokens behind the rows `x` in the places of `prompt`, as [`Generation::run`] gives them.
    ///
    /// # Errors
    /// Those of [`causal::generate_embedded`] and [`seq2seq::generate`].
    pub fn generate(
        &self,
        spec: &ModelSpec,
        generation: &Generation,
        prompt: &Prompt,
        x: Tensor,
        observer: &mut dyn Observer,
    ) -> Result<Tensors, SessionError> {
        match self {
            Self::Decoder(model) => {
                let (ids, mask) = (&prompt.input_ids, prompt.attention_mask.as_ref());
                causal::generate_embedded(&**model, spec, generation, ids, mask, x, observer)
            }
            Self::EncoderDecoder(model) => {
                let start = seq2seq::decoder_prompt(generation, x.dim(0)?, None)?;
                let encoded = Self::encode(model, prompt, x)?;
                seq2seq::generate(model.decoder(), spec, generation, &start, encoded, observer)
            }
        }
    }

    /// The cost of [`forward`](Self::forward), or with a `generation` that of [`generate`](Self::generate).
    ///
    /// # Errors
    /// A prompt without tokens for the decoder that there is.
    pub fn cost(&self, prompt: &Prompt, generation: Option<&Generation>) -> Result<Vec<PhaseCost>, SessionError> {
        let [batch, seq] = prompt.shape();
        let new = generation.map(|generation| generation.max_new_tokens as u64);
        match (self, new) {
            (Self::Decoder(model), None) => Ok(forward_phase(model.cost(Pass { batch, seq, cached: 0, logits: seq }))),
            (Self::Decoder(model), Some(new)) => Ok(causal::generate_cost(&**model, [batch, seq], new)),
            (Self::EncoderDecoder(model), new) => {
                let (encoder, pass) = (model.encoder_cost([batch, seq]), |pass: Pass| model.decoder().cost(pass, seq));
                if let Some(new) = new {
                    return Ok(seq2seq::generate_cost(pass, encoder, [batch, 1], new));
                }
                let length = decoder_input_ids(prompt)?.dim(1)? as u64;
                Ok(forward_phase(encoder + pass(Pass { batch, seq: length, cached: 0, logits: length })))
            }
        }
    }
}

fn decoder_input_ids(prompt: &Prompt) -> Result<&Tensor, SessionError> {
    let ids = prompt.decoder_input_ids.as_ref();
    ids.ok_or_else(|| SessionError::input("decoder_input_ids", "is missing; `generate` writes tokens"))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use serde_json::json;

    use super::*;

    fn spec(text_config: Value) -> ModelSpec {
        ModelSpec::new("llava", "LlavaForConditionalGeneration", json!({ "text_config": text_config }))
    }

    #[test]
    fn what_text_config_leaves_out_is_as_in_the_class() {
        let llama = TextConfig::from_spec(&spec(json!({"vocab_size": 32064})), &["llama", "mistral"]).unwrap();
        let TextConfig::Llama(cfg) = &llama else { panic!("{llama:?}") };
        assert_eq!((cfg.vocab_size, cfg.hidden_size, cfg.kv_heads(), cfg.window), (32064, 4096, 32, None));
        let mistral = TextConfig::from_spec(&spec(json!({"model_type": "mistral"})), &["llama", "mistral"]).unwrap();
        let TextConfig::Llama(cfg) = &mistral else { panic!("{mistral:?}") };
        assert_eq!((cfg.intermediate_size, cfg.kv_heads(), cfg.window), (14336, 8, Some(4096)));
        let opt = TextConfig::from_spec(&spec(json!({})), &["opt", "t5"]).unwrap();
        assert_eq!(opt.width(), 768);
        let tokens = opt.with_tokens(&spec(json!({"eos_token_id": 50118})));
        assert_eq!(tokens, json!({"bos_token_id": 2, "eos_token_id": 50118, "pad_token_id": 1}));
    }

    #[test]
    fn other_language_models_are_refused_by_name() {
        let message = |text: Value, supported: &[&str]| {
            TextConfig::from_spec(&spec(text), supported).err().map(|error| error.to_string()).unwrap_or_default()
        };
        let error = message(json!({"model_type": "qwen2"}), &["llama", "mistral"]);
        assert!(error.contains("`text_config.model_type` = \"qwen2\" is not supported for llava"), "{error}");
        let error = message(json!({"word_embed_proj_dim": 512}), &["opt"]);
        assert!(error.contains("`text_config.word_embed_proj_dim`: is 512"), "{error}");
    }

    #[test]
    fn features_go_where_their_tokens_are() -> Result<(), Box<dyn std::error::Error>> {
        let cpu = &Device::Cpu;
        let prompt = Prompt::of(Tensor::new(&[[9i64, 1, 9], [2, 9, 9]], cpu)?);
        let embeddings = Tensor::new(&[[[0f32], [1.], [2.]], [[3.], [4.], [5.]]], cpu)?;
        let features = Tensor::new(&[[10f32], [11.], [12.], [13.]], cpu)?;
        let x = prompt.put(&embeddings, 9, &features)?.to_vec3::<f32>()?;
        assert_eq!(x, [[[10.], [1.], [11.]], [[3.], [12.], [13.]]]);
        prompt.check_places(9, 4)?;
        let error = prompt.check_places(9, 3).err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(error, "input `input_ids`: holds the image token 9 4 times, pixel_values give 3 features");
        Ok(())
    }
}

//! Encoder-decoder models as sessions: `forward` over whole sequences and `generate`, where the encoder runs once and
//! each layer of the decoder makes its keys and values of the encoder's states once.
//!
//! The decoder's half asks for states alone, so that an encoder of pictures can stand before it as well: see
//! [`CrossDecoder`] and [`generate`].

use std::collections::BTreeMap;

use candle_core::Tensor;
use roofbench_core::cost::{Cost, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, in_range, unsupported_method, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::decoding::Decoding;
use roofbench_nn::kernels::isa;

use crate::causal::{DecoderShape, Pass, at_the_end, phases};

/// A decoder that attends to the states of an encoder, whichever that is, with its output layer.
pub trait CrossDecoder {
    /// Its sizes.
    fn shape(&self) -> DecoderShape;

    /// The embeddings of tokens, without positions.
    ///
    /// # Shapes
    /// (batch, seq) → (batch, seq, hidden).
    ///
    /// # Errors
    /// Candle's.
    fn embed(&self, input_ids: &Tensor) -> Result<Tensor>;

    /// The states after the last layer and its normalisation, from embeddings at the positions of `decoding`.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// Candle's.
    fn decode(&self, x: Tensor, decoding: &mut Decoding, encoded: &mut Encoded) -> Result<Tensor>;

    /// Scores of every token.
    ///
    /// # Shapes
    /// (..., hidden) → (..., vocab).
    ///
    /// # Errors
    /// Candle's.
    fn logits(&self, x: &Tensor) -> Result<Tensor>;

    /// FLOPs and bytes of one pass that sees `states` states an item, by formula. The pass with no position before it
    /// makes their keys and values.
    fn cost(&self, pass: Pass, states: u64) -> Cost;
}

/// An encoder of text and the decoder behind it.
pub trait Seq2SeqLm {
    /// The decoder's half.
    type Decoder: CrossDecoder;

    /// Token ids that the class has where config.json leaves them out.
    const TOKENS: &'static [(&'static str, i64)];

    /// A call of `forward` without tokens for the decoder gives it the encoder's, behind the start token.
    const SHIFTS_INPUTS: bool = false;

    /// The decoder's half.
    fn decoder(&self) -> &Self::Decoder;

    /// The most tokens that the encoder has positions for.
    fn max_positions(&self) -> Option<usize>;

    /// The encoder's states.
    ///
    /// # Shapes
    /// (batch, seq) → (batch, seq, hidden); the mask is (batch, seq) of 0 and 1.
    ///
    /// # Errors
    /// Candle's.
    fn encode(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor>;

    /// FLOPs and bytes of the encoder over (batch, seq) tokens, by formula.
    fn encoder_cost(&self, shape: [u64; 2]) -> Cost;
}

/// What `decoder` makes of whole sequences (batch, seq): the logits of every position.
///
/// # Errors
/// Candle's; sequences that are too long.
pub fn forward(
    decoder: &impl CrossDecoder,
    decoder_input_ids: &Tensor,
    decoder_attention_mask: Option<&Tensor>,
    encoded: &mut Encoded,
) -> Result<Tensor, SessionError> {
    let (batch, seq) = decoder_input_ids.dims2()?;
    decoder.shape().check_length("decoder_input_ids", seq)?;
    let mut decoding = Decoding::once(batch, seq, decoder_attention_mask, decoder_input_ids.device())?;
    let x = decoder.embed(decoder_input_ids)?; // (batch, seq, hidden)
    Ok(decoder.logits(&decoder.decode(x, &mut decoding, encoded)?)?)
}

/// Tokens one after another behind `prompt`, as [`Generation::run`] gives them. The encoder has run: its time is the
/// prefill's, which begins with the call.
///
/// # Errors
/// Those of [`Generation::run`]; more positions than the decoder has.
pub fn generate(
    decoder: &impl CrossDecoder,
    spec: &ModelSpec,
    generation: &Generation,
    prompt: &[Vec<i64>],
    encoded: Encoded,
    observer: &mut dyn Observer,
) -> Result<Tensors, SessionError> {
    generate_masked(decoder, spec, generation, prompt, None, encoded, observer)
}

/// The same behind a prompt of which `attention_mask` (batch, seq) of 0 and 1 says which tokens exist; padding may stand
/// on either side.
///
/// # Errors
/// As for [`generate`], and when no token of a sequence exists.
pub fn generate_masked(
    decoder: &impl CrossDecoder,
    spec: &ModelSpec,
    generation: &Generation,
    prompt: &[Vec<i64>],
    attention_mask: Option<&Tensor>,
    mut encoded: Encoded,
    observer: &mut dyn Observer,
) -> Result<Tensors, SessionError> {
    let (batch, shape) = (prompt.len(), decoder.shape());
    let positions = generation.positions(prompt.first().map_or(0, Vec::len));
    shape.check_length("max_new_tokens", positions)?;
    let (placed, mask) = at_the_end(prompt, attention_mask)?;
    let mut decoding = shape.decoding(batch, positions, spec)?;
    if let Some(mask) = mask {
        decoding = decoding.with_attention_mask(&mask)?;
    }
    generation.run(prompt, observer, |tokens| {
        let ids = tokens.map_or_else(|| placed.concat(), <[i64]>::to_vec);
        let seq = ids.len() / batch;
        decoding.advance(seq)?;
        let x = decoder.embed(&Tensor::from_vec(ids, (batch, seq), &spec.device)?)?;
        let x = decoder.decode(x, &mut decoding, &mut encoded)?; // (batch, seq, hidden)
        Ok(decoder.logits(&x.narrow(1, seq - 1, 1)?.contiguous()?.squeeze(1)?)?)
    })
}

/// What the decoder begins with: its start token, or `given` (batch, seq), behind the start token where none of the
/// sequences has it.
///
/// # Errors
/// When nothing says which the start token is.
pub fn decoder_prompt(
    generation: &Generation,
    batch: usize,
    given: Option<&Tensor>,
) -> Result<Vec<Vec<i64>>, SessionError> {
    let start = generation.decoder_start()?;
    let Some(given) = given else { return Ok(vec![vec![start]; batch]) };
    let mut rows = given.to_vec2::<i64>()?;
    if rows.iter().all(|row| row.first() != Some(&start)) {
        rows.iter_mut().for_each(|row| row.insert(0, start));
    }
    Ok(rows)
}

/// How tokens are chosen, and what the decoder of `batch` sequences begins with: [`decoder_prompt`].
///
/// # Errors
/// As for [`Generation::read`] and [`decoder_prompt`].
pub fn plan(
    spec: &ModelSpec,
    call: &Call,
    batch: usize,
    given: Option<&Tensor>,
) -> Result<(Generation, Vec<Vec<i64>>), SessionError> {
    let length = given.map_or(Ok(1), |ids| ids.dim(1))?;
    let generation = Generation::read(spec, call, length, &[])?;
    let prompt = decoder_prompt(&generation, batch, given)?;
    match prompt.first().map_or(0, Vec::len) {
        same if same == length => Ok((generation, prompt)),
        longer => Ok((Generation::read(spec, call, longer, &[])?, prompt)),
    }
}

/// The decoder's tokens of a call, i64 (batch, seq), and which of them exist, where it has them. `batch` is that of the
/// input named before it.
///
/// # Errors
/// Names the input that has another shape or type, or values that can't be.
pub fn decoder_inputs(
    inputs: &Inputs,
    (of, batch): (&str, usize),
    vocab_size: usize,
) -> Result<(Option<Tensor>, Option<Tensor>), SessionError> {
    let Some(ids) = inputs.optional_matrix("decoder_input_ids")? else {
        return match inputs.optional_matrix("decoder_attention_mask")? {
            None => Ok((None, None)),
            Some(_) => {
                let reason = "goes with decoder_input_ids, which are missing";
                Err(SessionError::input("decoder_attention_mask", reason))
            }
        };
    };
    in_range("decoder_input_ids", &ids, "vocab_size", vocab_size)?;
    let found = ids.dim(0)?;
    if found != batch {
        let reason = format!("holds {found} sequences, {of} hold {batch}");
        return Err(SessionError::input("decoder_input_ids", reason));
    }
    let mask = inputs.matrix_as("decoder_attention_mask", ("decoder_input_ids", &ids))?;
    if let Some(mask) = &mask {
        zero_or_one("decoder_attention_mask", mask)?;
    }
    Ok((Some(ids), mask))
}

/// Prefill of a prompt (batch, seq) behind an encoder that costs `encoder`, and the decoding of `new_tokens` tokens,
/// the first of which the prefill gives. `pass` is the cost of one pass of the decoder.
pub fn generate_cost(
    pass: impl Fn(Pass) -> Cost,
    encoder: Cost,
    [batch, seq]: [u64; 2],
    new_tokens: u64,
) -> Vec<PhaseCost> {
    let prefill = encoder + pass(Pass { batch, seq, cached: 0, logits: 1 });
    let step = |made| pass(Pass { batch, seq: 1, cached: seq + made - 1, logits: 1 });
    phases(prefill, (1..new_tokens).map(step).sum(), new_tokens)
}

/// The tensors of a call, checked.
pub(crate) struct Request {
    /// (batch, seq), i64.
    pub(crate) input_ids: Tensor,
    /// (batch, seq) of 0 and 1.
    pub(crate) attention_mask: Option<Tensor>,
    /// (batch, decoder's seq), i64.
    decoder_input_ids: Option<Tensor>,
    /// (batch, decoder's seq) of 0 and 1.
    decoder_attention_mask: Option<Tensor>,
}

impl Request {
    pub(crate) fn read(call: &Call, vocab_size: usize) -> Result<Self, SessionError> {
        let known = ["input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"];
        let inputs = match call.method.as_str() {
            "forward" => Inputs::forward(call, &known, &["use_cache"])?,
            "generate" => Inputs::of_any_method(call, &known[..3])?,
            _ => return Err(unsupported_method(call, "forward, generate")),
        };
        let (input_ids, attention_mask) = source(&inputs, vocab_size)?;
        let (decoder_input_ids, decoder_attention_mask) =
            decoder_inputs(&inputs, ("input_ids", input_ids.dim(0)?), vocab_size)?;
        Ok(Self { input_ids, attention_mask, decoder_input_ids, decoder_attention_mask })
    }

    /// How tokens are chosen, and what the decoder begins with.
    pub(crate) fn plan(&self, spec: &ModelSpec, call: &Call) -> Result<(Generation, Vec<Vec<i64>>), SessionError> {
        plan(spec, call, self.input_ids.dim(0)?, self.decoder_input_ids.as_ref())
    }
}

/// The encoder's tokens (batch, seq) and their mask.
///
/// # Errors
/// Names the argument that is missing or does not fit.
pub fn source(inputs: &Inputs, vocab_size: usize) -> Result<(Tensor, Option<Tensor>), SessionError> {
    let input_ids = inputs.matrix("input_ids")?;
    in_range("input_ids", &input_ids, "vocab_size", vocab_size)?;
    let attention_mask = inputs.matrix_like("attention_mask", &input_ids)?;
    if let Some(mask) = &attention_mask {
        zero_or_one("attention_mask", mask)?;
    }
    Ok((input_ids, attention_mask))
}

/// A [`Seq2SeqLm`] behind the calls of its class.
pub(crate) struct Seq2SeqSession<M> {
    model: M,
    /// Its config.json says the token ids that the class has.
    spec: ModelSpec,
    paths: BTreeMap<String, String>,
}

impl<M: Seq2SeqLm> Seq2SeqSession<M> {
    pub(crate) fn new(model: M, spec: &ModelSpec) -> Self {
        let paths = isa::paths(&spec.device, spec.dtype);
        Self { model, spec: with_tokens(spec, M::TOKENS), paths }
    }

    fn read(&self, call: &Call) -> Result<Request, SessionError> {
        let request = Request::read(call, self.model.decoder().shape().vocab_size)?;
        let seq = request.input_ids.dim(1)?;
        match self.model.max_positions() {
            Some(most) if seq > most => {
                let reason = format!("comes to {seq} positions, the encoder has {most}; truncate it");
                Err(SessionError::input("input_ids", reason))
            }
            _ => Ok(request),
        }
    }

    /// The decoder's tokens of `forward`.
    fn decoder_input_ids(&self, request: &Request) -> Result<Tensor, SessionError> {
        if let Some(ids) = &request.decoder_input_ids {
            return Ok(ids.clone());
        }
        let start = self.spec.config.get("decoder_start_token_id").and_then(serde_json::Value::as_i64);
        let Some(start) = start.filter(|_| M::SHIFTS_INPUTS) else {
            return Err(SessionError::input("decoder_input_ids", "is missing"));
        };
        let (batch, seq) = request.input_ids.dims2()?;
        let first = Tensor::full(start, (batch, 1), request.input_ids.device())?;
        Ok(Tensor::cat(&[&first, &request.input_ids.narrow(1, 0, seq - 1)?], 1)?)
    }

    fn encode(&self, request: &Request) -> Result<Encoded> {
        let mask = request.attention_mask.as_ref();
        let states = self.model.encode(&request.input_ids, mask)?; // (batch, seq, hidden)
        Encoded::new(states, mask, self.model.decoder().shape().layers)
    }

    fn forward(&self, request: &Request) -> Result<Tensors, SessionError> {
        let decoder_input_ids = self.decoder_input_ids(request)?;
        let mut encoded = self.encode(request)?;
        let mask = request.decoder_attention_mask.as_ref();
        let logits = forward(self.model.decoder(), &decoder_input_ids, mask, &mut encoded)?;
        let states = encoded.states().clone();
        Ok(Tensors::from([("encoder_last_hidden_state".to_owned(), states), ("logits".to_owned(), logits)]))
    }
}

/// `spec` with those of `tokens` in its config.json that the file leaves out.
pub(crate) fn with_tokens(spec: &ModelSpec, tokens: &[(&str, i64)]) -> ModelSpec {
    let mut spec = spec.clone();
    if let Some(config) = spec.config.as_object_mut() {
        for (name, id) in tokens {
            config.entry(*name).or_insert_with(|| (*id).into());
        }
    }
    spec
}

impl<M: Seq2SeqLm> Session for Seq2SeqSession<M> {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let request = self.read(call)?;
        if call.method == "generate" {
            let (generation, prompt) = request.plan(&self.spec, call)?;
            let encoded = self.encode(&request)?;
            return generate(self.model.decoder(), &self.spec, &generation, &prompt, encoded, observer);
        }
        let outputs = self.forward(&request)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let request = self.read(call)?;
        let (batch, states) = request.input_ids.dims2()?;
        let [batch, states] = [batch, states].map(|size| size as u64);
        let encoder = self.model.encoder_cost([batch, states]);
        let pass = |pass| self.model.decoder().cost(pass, states);
        if call.method == "generate" {
            let (generation, prompt) = request.plan(&self.spec, call)?;
            let length = prompt.first().map_or(0, Vec::len) as u64;
            return Ok(generate_cost(pass, encoder, [batch, length], generation.max_new_tokens as u64));
        }
        let seq = self.decoder_input_ids(&request)?.dim(1)? as u64;
        let cost = encoder + pass(Pass { batch, seq, cached: 0, logits: seq });
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

//! Decoder-only language models as sessions: `forward` over whole sequences and `generate` on a cache, with padding on
//! either side.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use roofbench_core::cost::{Cost, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, in_range, unsupported_method, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_nn::decoding::Decoding;
use roofbench_nn::gather::{RowIndex, gather};
use roofbench_nn::kernels::isa;
use roofbench_nn::kv_cache;

/// What a session needs to know of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderShape {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Layers, each with keys and values.
    pub layers: usize,
    /// Width of a key or value row, kv_heads · head_dim.
    pub kv_width: usize,
    /// The last positions that a token sees, itself included; all where absent.
    pub window: Option<usize>,
    /// The most positions, where it has no more embeddings of them.
    pub max_positions: Option<usize>,
}

impl DecoderShape {
    /// Room for `positions` positions of `batch` sequences.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn decoding(&self, batch: usize, positions: usize, spec: &ModelSpec) -> Result<Decoding> {
        let shape = kv_cache::Shape { batch, positions, width: self.kv_width };
        let dtype = if spec.device.is_cpu() { DType::F32 } else { spec.dtype };
        Decoding::cached(self.layers, shape, self.window, dtype, &spec.device)
    }

    /// Refuses sequences of more positions than there are embeddings of; `name` is the argument that asks for them.
    ///
    /// # Errors
    /// Names the argument.
    pub fn check_length(&self, name: &str, positions: usize) -> Result<(), SessionError> {
        match self.max_positions {
            Some(most) if positions > most => {
                Err(SessionError::input(name, format!("comes to {positions} positions, the model has {most}")))
            }
            _ => Ok(()),
        }
    }
}

/// One pass of a decoder, for its cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Sequences.
    pub batch: u64,
    /// Rows of each.
    pub seq: u64,
    /// Positions before them.
    pub cached: u64,
    /// Rows of each that logits are made of: all, or the last.
    pub logits: u64,
}

/// A decoder-only language model; its keys and values are the caller's.
pub trait CausalLm {
    /// Its sizes.
    fn shape(&self) -> DecoderShape;

    /// The length past which generation throws its cache away and runs the whole sequence again, because the positions
    /// of all tokens are others there.
    fn starts_over(&self) -> Option<usize> {
        None
    }

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
    fn decode(&self, x: Tensor, decoding: &mut Decoding) -> Result<Tensor>;

    /// Scores of every token.
    ///
    /// # Shapes
    /// (..., hidden) → (..., vocab).
    ///
    /// # Errors
    /// Candle's.
    fn logits(&self, x: &Tensor) -> Result<Tensor>;

    /// FLOPs and bytes of one pass, by formula.
    fn cost(&self, pass: Pass) -> Cost;
}

/// A [`CausalLm`] behind the calls of its class.
pub(crate) struct CausalSession<M> {
    model: M,
    spec: ModelSpec,
    paths: BTreeMap<String, String>,
}

/// The tokens of a call.
pub(crate) struct Prompt {
    /// (batch, seq), i64.
    pub(crate) input_ids: Tensor,
    /// (batch, seq) of 0 and 1.
    pub(crate) attention_mask: Option<Tensor>,
    /// (batch, seq), where the call has its own.
    pub(crate) position_ids: Option<Tensor>,
}

impl Prompt {
    /// Reads and checks the tensors of `call` to a decoder of `shape`.
    pub(crate) fn read(call: &Call, shape: DecoderShape) -> Result<Self, SessionError> {
        let inputs = match call.method.as_str() {
            "forward" => Inputs::forward(call, &["input_ids", "attention_mask", "position_ids"], &["use_cache"])?,
            "generate" => Inputs::of_any_method(call, &["input_ids", "attention_mask"])?,
            _ => return Err(unsupported_method(call, "forward, generate")),
        };
        let input_ids = inputs.matrix("input_ids")?;
        in_range("input_ids", &input_ids, "vocab_size", shape.vocab_size)?;
        let attention_mask = inputs.matrix_like("attention_mask", &input_ids)?;
        if let Some(mask) = &attention_mask {
            zero_or_one("attention_mask", mask)?;
        }
        let position_ids = inputs.matrix_like("position_ids", &input_ids)?;
        if let Some(ids) = &position_ids {
            in_range("position_ids", ids, "max_position_embeddings", shape.max_positions.unwrap_or(1 << 24))?;
        }
        Ok(Self { input_ids, attention_mask, position_ids })
    }
}

impl<M: CausalLm> CausalSession<M> {
    pub(crate) fn new(model: M, spec: &ModelSpec) -> Self {
        let paths = isa::paths(&spec.device, spec.dtype);
        Self { model, spec: spec.clone(), paths }
    }

    fn read(&self, call: &Call) -> Result<Prompt, SessionError> {
        Prompt::read(call, self.model.shape())
    }

    fn forward(&self, prompt: &Prompt) -> Result<Tensors, SessionError> {
        let (batch, seq) = prompt.input_ids.dims2()?;
        self.model.shape().check_length("input_ids", seq)?;
        let mut decoding = Decoding::once(batch, seq, prompt.attention_mask.as_ref(), &self.spec.device)?;
        if let Some(position_ids) = &prompt.position_ids {
            decoding = decoding.with_positions(position_ids)?;
        }
        let x = self.model.embed(&prompt.input_ids)?; // (batch, seq, hidden)
        let x = self.model.decode(x, &mut decoding)?;
        Ok(Tensors::from([("logits".to_owned(), self.model.logits(&x)?)]))
    }

    fn generate(&self, call: &Call, prompt: Prompt, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (batch, seq) = prompt.input_ids.dims2()?;
        let generation = Generation::read(&self.spec, call, seq, &[])?;
        self.model.shape().check_length("max_new_tokens", generation.positions(seq))?;
        let ids = prompt.input_ids.to_vec2::<i64>()?;
        let (mut rows, mask) = at_the_end(&ids, prompt.attention_mask.as_ref())?;
        let mut decoding = self.decoding(batch, generation.positions(seq), mask.as_ref())?;
        let mut past = 0;
        generation.run(&ids, observer, |tokens| {
            for (row, token) in rows.iter_mut().zip(tokens.unwrap_or_default()) {
                row.push(*token);
            }
            if past > 0 && self.model.starts_over() == Some(past) {
                // the last place of a prompt exists, and so does what follows it
                let mask = mask.as_ref().map(|mask| mask.pad_with_same(1, 0, past + 1 - seq)).transpose()?;
                decoding = self.decoding(batch, generation.positions(seq), mask.as_ref())?;
                past = 0;
            }
            let fed: Vec<i64> = rows.iter().flat_map(|row| &row[past..]).copied().collect();
            let ids = Tensor::from_vec(fed, (batch, rows[0].len() - past), &self.spec.device)?;
            past = rows[0].len();
            Ok(next_logits(&self.model, self.model.embed(&ids)?, &mut decoding)?)
        })
    }

    /// Room for `positions` positions behind a prompt of which `mask` says what exists.
    fn decoding(&self, batch: usize, positions: usize, mask: Option<&Tensor>) -> Result<Decoding> {
        let decoding = decoding(&self.model, batch, positions, &self.spec)?;
        match mask {
            Some(mask) => decoding.with_attention_mask(mask),
            None => Ok(decoding),
        }
    }
}

/// Room for `positions` positions of `batch` sequences of a decoder.
///
/// # Errors
/// When memory cannot be had.
pub fn decoding(
    model: &(impl CausalLm + ?Sized),
    batch: usize,
    positions: usize,
    spec: &ModelSpec,
) -> Result<Decoding> {
    model.shape().decoding(batch, positions, spec)
}

/// The logits of the token behind the rows `x` (batch, seq, hidden), which follow what `decoding` has: (batch, vocab).
///
/// # Errors
/// Candle's.
pub fn next_logits(model: &(impl CausalLm + ?Sized), x: Tensor, decoding: &mut Decoding) -> Result<Tensor> {
    let seq = x.dim(1)?;
    decoding.advance(seq)?;
    let x = model.decode(x, decoding)?; // (batch, seq, hidden)
    model.logits(&x.narrow(1, seq - 1, 1)?.contiguous()?.squeeze(1)?)
}

/// Tokens one after another, as [`Generation::run`] gives them, behind a prompt whose rows are not those of its tokens
/// alone: `x` (batch, seq, hidden) stand in the places of `prompt` (batch, seq), of which `attention_mask` (batch, seq) of
/// 0 and 1 says which exist. What made the rows has run: its time is the prefill's, which begins with the call. The model
/// is none that starts over.
///
/// # Errors
/// Those of [`Generation::run`]; more positions than the model has; when no token of a sequence exists.
pub fn generate_embedded(
    model: &(impl CausalLm + ?Sized),
    spec: &ModelSpec,
    generation: &Generation,
    prompt: &Tensor,
    attention_mask: Option<&Tensor>,
    x: Tensor,
    observer: &mut dyn Observer,
) -> Result<Tensors, SessionError> {
    let (batch, seq, _) = x.dims3()?;
    model.shape().check_length("max_new_tokens", generation.positions(seq))?;
    let places = vec![(0..seq as i64).collect::<Vec<_>>(); batch];
    let (placed, mask) = at_the_end(&places, attention_mask)?;
    let x = match placed == places {
        true => x,
        false => {
            let row = |(item, places): (usize, &Vec<i64>)| {
                places.iter().map(|place| Some(item * seq + *place as usize)).collect::<Vec<_>>()
            };
            gather(&x, &RowIndex::new(batch * seq, (batch, seq), placed.iter().enumerate().flat_map(row))?)?
        }
    };
    let mut decoding = decoding(model, batch, generation.positions(seq), spec)?;
    if let Some(mask) = mask {
        decoding = decoding.with_attention_mask(&mask)?;
    }
    generation.run(&prompt.to_vec2::<i64>()?, observer, |tokens| {
        let x = match tokens {
            None => x.clone(),
            Some(tokens) => model.embed(&Tensor::new(tokens, &spec.device)?.unsqueeze(1)?)?,
        };
        Ok(next_logits(model, x, &mut decoding)?)
    })
}

/// The sequences with their padding before them, and the mask that says so, where there is any: what follows the last
/// token of a sequence has to be behind it.
///
/// # Errors
/// When the mask (batch, seq), of 0 and 1, keeps no token of a sequence.
pub fn at_the_end(ids: &[Vec<i64>], mask: Option<&Tensor>) -> Result<(Vec<Vec<i64>>, Option<Tensor>), SessionError> {
    let Some(mask) = mask else { return Ok((ids.to_vec(), None)) };
    let mut rows = mask.to_vec2::<i64>()?;
    let mut placed = ids.to_vec();
    for (item, (row, ids)) in rows.iter_mut().zip(&mut placed).enumerate() {
        let Some(last) = row.iter().rposition(|exists| *exists == 1) else {
            return Err(SessionError::input("attention_mask", format!("keeps no token of sequence {item}")));
        };
        let behind = row.len() - 1 - last;
        row.rotate_right(behind);
        ids.rotate_right(behind);
    }
    Ok((placed, Some(Tensor::new(rows, &candle_core::Device::Cpu)?)))
}

impl<M: CausalLm> Session for CausalSession<M> {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let prompt = self.read(call)?;
        if call.method == "generate" {
            return self.generate(call, prompt, observer);
        }
        let outputs = self.forward(&prompt)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (batch, seq) = self.read(call)?.input_ids.dims2()?;
        let (rows, length) = (batch as u64, seq as u64);
        if call.method == "forward" {
            let cost = self.model.cost(Pass { batch: rows, seq: length, cached: 0, logits: length });
            return Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }]);
        }
        let generation = Generation::read(&self.spec, call, seq, &[])?;
        Ok(generate_cost(&self.model, [rows, length], generation.max_new_tokens as u64))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// Prefill of (batch, seq) rows and the decoding of `new_tokens` tokens, the first of which the prefill gives.
pub fn generate_cost(model: &(impl CausalLm + ?Sized), [batch, seq]: [u64; 2], new_tokens: u64) -> Vec<PhaseCost> {
    let starts_over = model.starts_over().map(|length| length as u64);
    phase_costs(|pass| model.cost(pass), starts_over, [batch, seq], new_tokens)
}

/// [`generate_cost`] of a decoder whose passes cost what `cost` says.
pub(crate) fn phase_costs(
    cost: impl Fn(Pass) -> Cost,
    starts_over: Option<u64>,
    [batch, seq]: [u64; 2],
    new_tokens: u64,
) -> Vec<PhaseCost> {
    let prefill = cost(Pass { batch, seq, cached: 0, logits: 1 });
    let step = |made| match seq + made - 1 {
        past if starts_over == Some(past) => cost(Pass { batch, seq: past + 1, cached: 0, logits: 1 }),
        past => cost(Pass { batch, seq: 1, cached: past, logits: 1 }),
    };
    phases(prefill, (1..new_tokens).map(step).sum(), new_tokens)
}

/// A prefill that gives the first of `new_tokens` tokens and the decoding of the others, where there are any.
pub(crate) fn phases(prefill: Cost, decode: Cost, new_tokens: u64) -> Vec<PhaseCost> {
    let phases = [(Phase::Prefill, 1, prefill), (Phase::Decode, new_tokens - 1, decode)];
    let there = phases.into_iter().filter(|(_, repeats, _)| *repeats > 0);
    there.map(|(phase, repeats, cost)| PhaseCost { phase, repeats, cost }).collect()
}

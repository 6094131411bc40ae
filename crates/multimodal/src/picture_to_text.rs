//! An encoder of pictures before a decoder of text, as a session: `forward` over whole sequences, and `generate`, where the
//! encoder runs once.

use std::collections::BTreeMap;

use candle_core::Tensor;
use roofbench_core::cost::{Cost, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, unsupported_method};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Session, SessionError, Tensors};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::kernels::isa;
use roofbench_text::causal::Pass;
use roofbench_text::seq2seq::{self, CrossDecoder};

use crate::models::{behind, forward_phase, named};

/// The two halves of such a model.
pub(crate) trait PictureToText {
    /// The decoder's half.
    type Decoder: CrossDecoder;

    /// What the encoder gets in a call.
    type Pictures;

    /// Its tensors, by the names of the call; the first says how many items there are.
    const INPUTS: &'static [&'static str];

    /// A prompt in which no sequence begins with the start token gets it.
    const STARTS_PROMPTS: bool;

    /// The decoder's half.
    fn decoder(&self) -> &Self::Decoder;

    /// The encoder's tensors of `call`, checked.
    fn read(&self, call: &Call) -> Result<Self::Pictures, SessionError>;

    /// Items, and states of each.
    fn shape(pictures: &Self::Pictures) -> [usize; 2];

    /// The encoder's states (batch, states, width), and what the decoder sees of them.
    fn encode(&self, pictures: &Self::Pictures) -> Result<(Tensor, Encoded), SessionError>;

    /// FLOPs and bytes of [`encode`](Self::encode), by formula.
    fn encoder_cost(&self, pictures: &Self::Pictures) -> Cost;
}

/// A [`PictureToText`] behind the calls of its class.
pub(crate) struct PictureToTextSession<M> {
    model: M,
    spec: ModelSpec,
    paths: BTreeMap<String, String>,
}

/// The tensors of a call, checked.
struct Request<P> {
    pictures: P,
    /// Items.
    batch: usize,
    /// States of each.
    states: usize,
    /// (batch, seq), i64.
    decoder_input_ids: Option<Tensor>,
    /// (batch, seq) of 0 and 1.
    decoder_attention_mask: Option<Tensor>,
}

impl<P> Request<P> {
    /// The decoder's tokens of `forward`.
    fn tokens(&self) -> Result<&Tensor, SessionError> {
        self.decoder_input_ids.as_ref().ok_or_else(|| SessionError::input("decoder_input_ids", "is missing"))
    }
}

impl<M: PictureToText> PictureToTextSession<M> {
    pub(crate) fn new(model: M, spec: &ModelSpec) -> Self {
        Self { model, spec: spec.clone(), paths: isa::paths(&spec.device, spec.dtype) }
    }

    fn read(&self, call: &Call) -> Result<Request<M::Pictures>, SessionError> {
        let known = [M::INPUTS, &["decoder_input_ids", "decoder_attention_mask"]].concat();
        let inputs = match call.method.as_str() {
            "forward" => Inputs::forward(call, &known, &["use_cache"])?,
            "generate" => Inputs::of_any_method(call, &known[..known.len() - 1])?,
            _ => return Err(unsupported_method(call, "forward, generate")),
        };
        let pictures = self.model.read(call)?;
        let [batch, states] = M::shape(&pictures);
        let vocab_size = self.model.decoder().shape().vocab_size;
        let (decoder_input_ids, decoder_attention_mask) =
            seq2seq::decoder_inputs(&inputs, (M::INPUTS[0], batch), vocab_size)?;
        Ok(Request { pictures, batch, states, decoder_input_ids, decoder_attention_mask })
    }

    /// How tokens are chosen, and what the decoder begins with.
    fn plan(&self, call: &Call, request: &Request<M::Pictures>) -> Result<(Generation, Vec<Vec<i64>>), SessionError> {
        match &request.decoder_input_ids {
            Some(ids) if !M::STARTS_PROMPTS => {
                Ok((Generation::read(&self.spec, call, ids.dim(1)?, &[])?, ids.to_vec2::<i64>()?))
            }
            given => seq2seq::plan(&self.spec, call, request.batch, given.as_ref()),
        }
    }

    fn forward(&self, request: &Request<M::Pictures>, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let tokens = request.tokens()?;
        let (states, mut encoded) = self.model.encode(&request.pictures)?;
        observer.end(Phase::Vision);
        let mask = request.decoder_attention_mask.as_ref();
        let logits = seq2seq::forward(self.model.decoder(), tokens, mask, &mut encoded)?;
        Ok(named([("encoder_last_hidden_state", states), ("logits", logits)]))
    }
}

impl<M: PictureToText> Session for PictureToTextSession<M> {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let request = self.read(call)?;
        if call.method == "generate" {
            let (generation, prompt) = self.plan(call, &request)?;
            let (_, encoded) = self.model.encode(&request.pictures)?;
            observer.end(Phase::Vision);
            return seq2seq::generate(self.model.decoder(), &self.spec, &generation, &prompt, encoded, observer);
        }
        let outputs = self.forward(&request, observer)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let request = self.read(call)?;
        let [batch, states] = [request.batch, request.states].map(|size| size as u64);
        let encoder = [(Phase::Vision, self.model.encoder_cost(&request.pictures))];
        let pass = |pass| self.model.decoder().cost(pass, states);
        if call.method == "generate" {
            let (generation, prompt) = self.plan(call, &request)?;
            let length = prompt.first().map_or(0, Vec::len) as u64;
            let new = generation.max_new_tokens as u64;
            return Ok(behind(encoder, seq2seq::generate_cost(pass, Cost::default(), [batch, length], new)));
        }
        let seq = request.tokens()?.dim(1)? as u64;
        Ok(behind(encoder, forward_phase(pass(Pass { batch, seq, cached: 0, logits: seq }))))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

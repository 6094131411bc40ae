//! Long short-term memory. Mirrors `torch.nn.LSTM`, one direction, without projections.

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::VarBuilder;

use crate::cost;
use crate::kernels::lstm as kernel;
use crate::kernels::matmul::{Epilogue, PackedMatrix, Rows, matmul};
use crate::linear::{self, Linear};
use crate::op;

/// Layers of LSTM, each over the outputs of the one before.
///
/// The products with the inputs are one product for all steps. A step then is one product with packed weights, to which
/// the inputs' part is added as it is written, and one pass over the gates.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use roofbench_nn::lstm::{Lstm, Order};
///
/// let (map, cpu) = (VarMap::new(), Device::Cpu);
/// let lstm = Lstm::load(3, 5, 2, VarBuilder::from_varmap(&map, DType::F32, &cpu))?;
/// let x = Tensor::zeros((7, 1, 3), DType::F32, &cpu)?; // (seq, batch, features)
/// let (y, state) = lstm.forward(&x, Order::SeqFirst, None)?;
/// assert_eq!((y.dims(), state.h.dims()), (&[7, 1, 5][..], &[2, 1, 5][..]));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Lstm {
    hidden: usize,
    layers: Vec<Layer>,
}

#[derive(Clone)]
struct Layer {
    /// Both biases in one.
    input: Linear,
    recurrent: Recurrent,
}

#[derive(Clone)]
enum Recurrent {
    /// For the kernel.
    Packed(Arc<PackedMatrix>),
    /// For candle: (4 · hidden, hidden).
    Plain(Tensor),
}

/// Which of the first two dimensions is time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// (seq, batch, features).
    SeqFirst,
    /// (batch, seq, features): `batch_first`.
    BatchFirst,
}

/// What goes from one call to the next.
#[derive(Debug, Clone)]
pub struct State {
    /// Outputs of the last step (layers, batch, hidden).
    pub h: Tensor,
    /// Cell states after the last step (layers, batch, hidden).
    pub c: Tensor,
}

impl Lstm {
    /// Reads `weight_ih_l0` (4 · hidden, features), `weight_hh_l0` (4 · hidden, hidden), `bias_ih_l0` and `bias_hh_l0`
    /// (4 · hidden), and likewise for the other layers.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(features: usize, hidden: usize, layers: usize, vb: VarBuilder<'_>) -> Result<Self> {
        let layer = |i: usize| {
            let width = if i == 0 { features } else { hidden };
            let weight = vb.get((4 * hidden, width), &format!("weight_ih_l{i}"))?;
            let recurrent = vb.get((4 * hidden, hidden), &format!("weight_hh_l{i}"))?.contiguous()?;
            let bias = |name: &str| vb.get(4 * hidden, &format!("bias_{name}_l{i}"));
            let bias = (bias("ih")? + bias("hh")?)?;
            let recurrent = match linear::pack(&recurrent, 4 * hidden, hidden)? {
                Some(packed) => Recurrent::Packed(Arc::new(packed)),
                None => Recurrent::Plain(recurrent),
            };
            Ok(Layer { input: Linear::new(&weight, Some(&bias))?, recurrent })
        };
        Ok(Self { hidden, layers: (0..layers).map(layer).collect::<Result<_>>()? })
    }

    /// The outputs of the last layer for every step, and the state after the last; from `state`, or from zeros.
    ///
    /// # Shapes
    /// `x` is (seq, batch, features) or (batch, seq, features) as `order` says, the outputs likewise with `hidden`.
    ///
    /// # Errors
    /// When `x` or the state has another shape.
    pub fn forward(&self, x: &Tensor, order: Order, state: Option<&State>) -> Result<(Tensor, State)> {
        let time_first = match order {
            Order::SeqFirst => x.clone(),
            Order::BatchFirst => x.transpose(0, 1)?,
        };
        let (_, batch, _) = time_first.dims3()?;
        let shape = [self.layers.len(), batch, self.hidden];
        let begin = match state {
            Some(state) => {
                if state.h.dims() != shape || state.c.dims() != shape {
                    let found = (state.h.dims(), state.c.dims());
                    bail!("Lstm: the state has shapes {found:?}, expected {shape:?} twice")
                }
                state.clone()
            }
            None => {
                let zeros = Tensor::zeros(&shape, x.dtype(), x.device())?;
                State { h: zeros.clone(), c: zeros }
            }
        };
        let mut x = time_first;
        let (mut h, mut c) = (Vec::new(), Vec::new());
        for (i, layer) in self.layers.iter().enumerate() {
            let gates = layer.input.forward(&x)?; // (seq, batch, 4 * hidden)
            let from = |x: &Tensor| x.narrow(0, i, 1)?.squeeze(0);
            let (y, last_c) = layer.steps(&gates, &from(&begin.h)?, &from(&begin.c)?)?;
            let seq = y.dim(0)?;
            h.push(if seq == 0 { from(&begin.h)? } else { y.narrow(0, seq - 1, 1)?.squeeze(0)? });
            c.push(last_c);
            x = y;
        }
        let y = match order {
            Order::SeqFirst => x,
            Order::BatchFirst => x.transpose(0, 1)?.contiguous()?,
        };
        Ok((y, State { h: Tensor::stack(&h, 0)?, c: Tensor::stack(&c, 0)? }))
    }
}

impl Layer {
    /// Outputs (seq, batch, hidden) and the last cell state (batch, hidden), from the inputs' part of the gates (seq,
    /// batch, 4 · hidden) and the state before.
    fn steps(&self, gates: &Tensor, h: &Tensor, c: &Tensor) -> Result<(Tensor, Tensor)> {
        let (seq, batch, hidden) = (gates.dim(0)?, gates.dim(1)?, gates.dim(2)? / 4);
        let _span = cost::span("lstm", None);
        cost::note(|| {
            let (rows, bytes) = (seq * batch, gates.dtype().size_in_bytes());
            let weights = match &self.recurrent {
                Recurrent::Packed(packed) => packed.bytes(),
                Recurrent::Plain(weight) => weight.elem_count() * weight.dtype().size_in_bytes(),
            };
            // the product and the sum with the inputs' part; five functions, three products, one sum
            let flops = rows * (2 * 4 * hidden * hidden + 4 * hidden + 9 * hidden);
            cost::weighted(flops, seq * weights, rows * hidden * bytes)
        });
        let packed = match &self.recurrent {
            Recurrent::Packed(packed) if op::is_cpu_f32(gates) => packed,
            Recurrent::Packed(_) => bail!("Lstm: the input is {:?}; on the CPU it is f32", gates.dtype()),
            Recurrent::Plain(weight) => return steps_plain(weight, gates, h, c),
        };
        let state = [h.contiguous()?, c.contiguous()?];
        // outputs, and behind them the last cell state
        let both = op::apply3("lstm", [&gates.contiguous()?, &state[0], &state[1]], |[gates, h, c]| {
            let (gates, h) = (op::elements::<f32>(gates.0, gates.1)?, op::elements::<f32>(h.0, h.1)?);
            let mut c = op::elements::<f32>(c.0, c.1)?.to_vec();
            let mut sums = Vec::with_capacity(batch * 4 * hidden);
            let mut out = vec![0f32; (seq + 1) * batch * hidden];
            for (step, inputs) in gates.chunks_exact((batch * 4 * hidden).max(1)).enumerate() {
                let (before, now) = out.split_at_mut(step * batch * hidden);
                let h = if step == 0 { h } else { &before[(step - 1) * batch * hidden..] };
                let epilogue = Epilogue { residual: Some(Rows::contiguous(inputs, 4 * hidden)), ..Epilogue::default() };
                sums.clear();
                let room = &mut sums.spare_capacity_mut()[..batch * 4 * hidden];
                matmul(Rows::contiguous(h, hidden), batch, packed, &epilogue, room)
                    .map_err(candle_core::Error::wrap)?;
                #[expect(unsafe_code, reason = "the product fills what is handed to it")]
                // SAFETY: the product wrote every element.
                unsafe {
                    sums.set_len(batch * 4 * hidden);
                }
                let items = c.chunks_exact_mut(hidden).zip(now.chunks_exact_mut(hidden));
                for (gates, (c, h)) in sums.chunks_exact(4 * hidden).zip(items) {
                    kernel::step(gates, c, h);
                }
            }
            out[seq * batch * hidden..].copy_from_slice(&c);
            Ok((out, (seq + 1, batch, hidden).into()))
        })?;
        Ok((both.narrow(0, 0, seq)?, both.narrow(0, seq, 1)?.squeeze(0)?))
    }
}

/// As the kernel, in candle's own operations.
fn steps_plain(weight: &Tensor, gates: &Tensor, h: &Tensor, c: &Tensor) -> Result<(Tensor, Tensor)> {
    let (mut h, mut c) = (h.clone(), c.clone());
    let weight = weight.t()?;
    let mut outputs = Vec::new();
    for step in 0..gates.dim(0)? {
        let sums = (gates.narrow(0, step, 1)?.squeeze(0)? + h.contiguous()?.matmul(&weight)?)?;
        let parts = sums.chunk(4, D::Minus1)?;
        let [i, f, g, o] = &parts[..] else { bail!("Lstm: the gates have shape {:?}", sums.shape()) };
        let sigmoid = candle_nn::ops::sigmoid;
        c = ((sigmoid(f)? * &c)? + (sigmoid(i)? * g.tanh()?)?)?;
        h = (sigmoid(o)? * c.tanh()?)?;
        outputs.push(h.clone());
    }
    let y = if outputs.is_empty() {
        Tensor::zeros((0, h.dim(0)?, h.dim(1)?), DType::F32, h.device())?.to_dtype(h.dtype())?
    } else {
        Tensor::stack(&outputs, 0)?
    };
    Ok((y, c))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;

    use super::*;

    /// Parameters in torch's order, counted through: sin(0.7 n).
    fn weights(features: usize, hidden: usize, layers: usize, dtype: DType) -> Result<HashMap<String, Tensor>> {
        let mut named = HashMap::new();
        let mut n = 0;
        for i in 0..layers {
            let width = if i == 0 { features } else { hidden };
            for (name, columns) in [("weight_ih", width), ("weight_hh", hidden), ("bias_ih", 1), ("bias_hh", 1)] {
                let data: Vec<f32> = (n..n + 4 * hidden * columns).map(|i| (i as f32 * 0.7).sin()).collect();
                n += data.len();
                let tensor = Tensor::from_vec(data, (4 * hidden, columns), &Device::Cpu)?.to_dtype(dtype)?;
                let tensor = if name.starts_with("bias") { tensor.flatten_all()? } else { tensor };
                named.insert(format!("{name}_l{i}"), tensor);
            }
        }
        Ok(named)
    }

    fn lstm(features: usize, hidden: usize, layers: usize, dtype: DType) -> Result<Lstm> {
        let vb = VarBuilder::from_tensors(weights(features, hidden, layers, dtype)?, dtype, &Device::Cpu);
        Lstm::load(features, hidden, layers, vb)
    }

    fn input(shape: (usize, usize, usize)) -> Result<Tensor> {
        let data: Vec<f32> = (0..shape.0 * shape.1 * shape.2).map(|i| (i as f32 * 0.9).cos()).collect();
        Tensor::from_vec(data, shape, &Device::Cpu)
    }

    fn largest(x: Tensor) -> Result<f64> {
        x.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar()
    }

    /// From torch 2: `torch.nn.LSTM(2, 3, num_layers=2)` with the weights and the input above.
    #[test]
    fn numbers_of_torch() -> Result<()> {
        let (y, state) = lstm(2, 3, 2, DType::F32)?.forward(&input((4, 2, 2))?, Order::SeqFirst, None)?;
        let expected = [
            0.174_186_57f32,
            0.149_446_9,
            -0.008_217_819,
            0.136_822_22,
            0.071_011_55,
            0.018_012_976,
            0.241_379_9,
            0.077_043_56,
            0.016_875_817,
            0.252_376_56,
            0.145_267_31,
            -5.658_597_7e-6,
            0.313_390_14,
            0.130_797_06,
            0.000_507_245_7,
            0.244_718_98,
            0.057_529_06,
            0.058_122_6,
            0.387_179_52,
            0.094_084_11,
            -0.001_611_905_4,
            0.288_438_5,
            0.154_561_8,
            0.009_201_336,
        ];
        let expected_c = [
            0.347_176_82f32,
            -0.792_387_37,
            -1.010_848,
            0.306_149_72,
            -1.032_385_5,
            -0.508_669_3,
            0.842_693_75,
            0.362_776_9,
            -0.007_986_339,
            0.660_961_2,
            0.452_888_7,
            0.052_667_312,
        ];
        for (got, want) in [(&y, &expected[..]), (&state.c, &expected_c[..])] {
            let want = Tensor::from_slice(want, got.shape(), &Device::Cpu)?;
            // sums of five products near 1, rounded, through two layers
            assert!(largest((got - want)?)? < 2e-6);
        }
        assert_eq!(state.h.narrow(0, 1, 1)?.to_vec3::<f32>()?, y.narrow(0, 3, 1)?.to_vec3::<f32>()?);
        Ok(())
    }

    #[test]
    fn against_the_definition_in_f64() -> Result<()> {
        for (features, hidden, layers, seq, batch) in [(3, 5, 1, 9, 1), (7, 33, 2, 6, 3), (16, 64, 2, 20, 1)] {
            let x = input((seq, batch, features))?;
            let (y, state) = lstm(features, hidden, layers, DType::F32)?.forward(&x, Order::SeqFirst, None)?;
            // f64 weights are not packed, so this is candle's path
            let plain = lstm(features, hidden, layers, DType::F64)?;
            let (plain_y, plain_state) = plain.forward(&x.to_dtype(DType::F64)?, Order::SeqFirst, None)?;
            let (want, want_c) = loop_f64(&weights(features, hidden, layers, DType::F32)?, &x, hidden, layers)?;
            let want = Tensor::from_vec(want, y.shape(), &Device::Cpu)?;
            assert!(largest((&plain_y - &want)?)? < 1e-6);
            // sums of up to 128 products in f32, carried on through the steps
            assert!(largest((y.to_dtype(DType::F64)? - want)?)? < 2e-5);
            let want_c = Tensor::from_vec(want_c, (batch, hidden), &Device::Cpu)?;
            let last = |state: State| state.c.narrow(0, layers - 1, 1)?.squeeze(0)?.to_dtype(DType::F64);
            assert!(largest((last(state)? - &want_c)?)? < 2e-5);
            assert!(largest((last(plain_state)? - &want_c)?)? < 1e-6);
        }
        Ok(())
    }

    /// Outputs of the last layer, and its cell state at the end.
    fn loop_f64(
        weights: &HashMap<String, Tensor>,
        x: &Tensor,
        hidden: usize,
        layers: usize,
    ) -> Result<(Vec<f64>, Vec<f64>)> {
        let flat = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let (seq, batch, mut width) = x.dims3()?;
        let mut x = flat(x)?;
        let mut c = Vec::new();
        for i in 0..layers {
            let get = |name: &str| flat(&weights[&format!("{name}_l{i}")]);
            let (w, r, b1, b2) = (get("weight_ih")?, get("weight_hh")?, get("bias_ih")?, get("bias_hh")?);
            c = vec![0.0; batch * hidden];
            let mut h = c.clone();
            let mut y = Vec::new();
            for step in 0..seq {
                let before = h.clone();
                for (item, unit) in (0..batch).flat_map(|item| (0..hidden).map(move |unit| (item, unit))) {
                    let gates = [0, 1, 2, 3].map(|gate| {
                        let row = gate * hidden + unit;
                        let from_x: f64 =
                            (0..width).map(|k| w[row * width + k] * x[(step * batch + item) * width + k]).sum();
                        let from_h: f64 = (0..hidden).map(|k| r[row * hidden + k] * before[item * hidden + k]).sum();
                        from_x + from_h + b1[row] + b2[row]
                    });
                    let at = item * hidden + unit;
                    (c[at], h[at]) = kernel::step_scalar(gates, c[at]);
                }
                y.extend_from_slice(&h);
            }
            (x, width) = (y, hidden);
        }
        Ok((x, c))
    }

    #[test]
    fn pieces_and_orders_give_the_same() -> Result<()> {
        let lstm = lstm(3, 8, 2, DType::F32)?;
        let x = input((6, 2, 3))?;
        let (whole, end) = lstm.forward(&x, Order::SeqFirst, None)?;
        let (first, state) = lstm.forward(&x.narrow(0, 0, 2)?, Order::SeqFirst, None)?;
        let (second, state) = lstm.forward(&x.narrow(0, 2, 4)?, Order::SeqFirst, Some(&state))?;
        assert_eq!(Tensor::cat(&[first, second], 0)?.to_vec3::<f32>()?, whole.to_vec3::<f32>()?);
        assert_eq!(state.c.to_vec3::<f32>()?, end.c.to_vec3::<f32>()?);
        let (y, _) = lstm.forward(&x.transpose(0, 1)?, Order::BatchFirst, None)?;
        assert_eq!(y.transpose(0, 1)?.to_vec3::<f32>()?, whole.to_vec3::<f32>()?);
        let (none, state) = lstm.forward(&x.narrow(0, 0, 0)?, Order::SeqFirst, Some(&end))?;
        assert_eq!((none.dims(), state.c.to_vec3::<f32>()?), (&[0, 2, 8][..], end.c.to_vec3::<f32>()?));
        let error = lstm.forward(&x.narrow(1, 0, 1)?, Order::SeqFirst, Some(&end)).unwrap_err().to_string();
        assert!(error.contains("expected [2, 1, 8] twice"), "{error}");
        Ok(())
    }
}

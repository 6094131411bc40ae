//! Feed-forward halves of a transformer layer: two products with an activation between, plain or gated.

use std::mem::MaybeUninit;

use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

use crate::activation::Activation;
use crate::cost;
use crate::kernels::gated as kernel;
use crate::linear::Linear;
use crate::op;

/// fc2(act(fc1(x))): the activation is part of the first product, the residual of the second.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::{activation::Activation, linear::Linear, mlp::Mlp};
///
/// let fc1 = Linear::new(&Tensor::new(&[[1f32], [-1.]], &Device::Cpu)?, None)?;
/// let fc2 = Linear::new(&Tensor::new(&[[1f32, 1.]], &Device::Cpu)?, None)?;
/// let mlp = Mlp::new(fc1, Activation::Relu, fc2)?; // |x|
/// assert_eq!(mlp.forward(&Tensor::new(&[[-3f32], [2.]], &Device::Cpu)?)?.to_vec2::<f32>()?, [[3.], [2.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Mlp {
    fc1: Linear,
    act: Activation,
    fc2: Linear,
}

impl Mlp {
    /// From its layers.
    ///
    /// # Errors
    /// When the second does not take what the first gives.
    pub fn new(fc1: Linear, act: Activation, fc2: Linear) -> Result<Self> {
        if fc1.out_dim() != fc2.in_dim() {
            bail!("Mlp: the first layer gives {}, the second takes {}", fc1.out_dim(), fc2.in_dim())
        }
        Ok(Self { fc1, act, fc2 })
    }

    /// Reads the layers that `names` gives under `vb`, from `dim` to `inner` and back.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(
        [dim, inner]: [usize; 2],
        act: Activation,
        bias: bool,
        names: [&str; 2],
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let fc1 = Linear::load(dim, inner, bias, vb.pp(names[0]))?;
        Self::new(fc1, act, Linear::load(inner, dim, bias, vb.pp(names[1]))?)
    }

    /// # Shapes
    /// (..., dim) → (..., dim).
    ///
    /// # Errors
    /// As for [`Linear::forward`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fc2.forward(&self.fc1.forward_act(x, self.act)?)
    }

    /// The same plus `residual`.
    ///
    /// # Shapes
    /// x and residual (..., dim) → (..., dim).
    ///
    /// # Errors
    /// As for [`Linear::forward_add`].
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.fc2.forward_add(&self.fc1.forward_act(x, self.act)?, residual)
    }
}

/// down(act(gate(x)) · up(x)) (arXiv:2002.05202): SwiGLU with SiLU, GeGLU with GELU. Gate and up are one product, and
/// one pass makes the gated values of it.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::{activation::Activation, linear::Linear, mlp::GatedMlp};
///
/// let gate_up = Linear::new(&Tensor::new(&[[1f32], [10.]], &Device::Cpu)?, None)?; // gate, then up
/// let down = Linear::new(&Tensor::new(&[[1f32]], &Device::Cpu)?, None)?;
/// let mlp = GatedMlp::new(gate_up, Activation::Relu, down)?;
/// assert_eq!(mlp.forward(&Tensor::new(&[[-3f32], [2.]], &Device::Cpu)?)?.to_vec2::<f32>()?, [[-0.], [40.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct GatedMlp {
    gate_up: Linear,
    act: Activation,
    down: Linear,
}

impl GatedMlp {
    /// From a layer that gives gate and up side by side, as Phi-3's checkpoints hold it, and the one that follows.
    ///
    /// # Errors
    /// When the second does not take half of what the first gives.
    pub fn new(gate_up: Linear, act: Activation, down: Linear) -> Result<Self> {
        if gate_up.out_dim() != 2 * down.in_dim() {
            bail!("GatedMlp: gate and up give {} together, down takes {}", gate_up.out_dim(), down.in_dim())
        }
        Ok(Self { gate_up, act, down })
    }

    /// Reads the layers that `names` gives under `vb` (gate, up, down), from `dim` to `inner` and back.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(
        [dim, inner]: [usize; 2],
        act: Activation,
        bias: bool,
        names: [&str; 3],
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let [gate, up, down] = names;
        let gate_up = Linear::load_fused(dim, &[(gate, inner), (up, inner)], bias, vb.clone())?;
        Self::new(gate_up, act, Linear::load(inner, dim, bias, vb.pp(down))?)
    }

    /// # Shapes
    /// (..., dim) → (..., dim).
    ///
    /// # Errors
    /// As for [`Linear::forward`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.down.forward(&gated(&self.gate_up.forward(x)?, self.act)?)
    }

    /// The same plus `residual`.
    ///
    /// # Shapes
    /// x and residual (..., dim) → (..., dim).
    ///
    /// # Errors
    /// As for [`Linear::forward_add`].
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.down.forward_add(&gated(&self.gate_up.forward(x)?, self.act)?, residual)
    }
}

/// Elements that one thread makes at a time.
const CHUNK: usize = 4096;

/// act(gate) · up of rows that hold gate and up side by side.
///
/// # Shapes
/// (..., 2 · inner) → (..., inner).
///
/// # Errors
/// When the last dimension is odd.
pub fn gated(gate_up: &Tensor, act: Activation) -> Result<Tensor> {
    let Some((&width, outer)) = gate_up.dims().split_last() else { bail!("gated: the input is a scalar") };
    if !width.is_multiple_of(2) {
        bail!("gated: the input has shape {:?}, its last dimension should be even", gate_up.dims())
    }
    let inner = width / 2;
    let _span = cost::span("gate", None);
    if !op::is_cpu_f32(gate_up) {
        let last = outer.len();
        cost::elementwise(gate_up.elem_count() / 2, 1);
        let gate = act.forward(&gate_up.narrow(last, 0, inner)?)?;
        return gate * gate_up.narrow(last, inner, inner)?;
    }
    // the product, and the activation unless it is none
    cost::elementwise(gate_up.elem_count() / 2, 1);
    act.note_cost(gate_up.elem_count() / 2);
    let shape = [outer, &[inner]].concat();
    op::apply1("gated", &gate_up.contiguous()?, |storage, layout| {
        let x = op::elements::<f32>(storage, layout)?;
        // a part may begin and end within a row
        let fill = |mut begin: usize, mut part: &mut [MaybeUninit<f32>]| {
            while !part.is_empty() {
                let (row, column) = (begin / inner, begin % inner);
                let n = part.len().min(inner - column);
                let (now, rest) = std::mem::take(&mut part).split_at_mut(n);
                let at = row * width + column;
                kernel::gated(act, &x[at..at + n], &x[at + inner..at + inner + n], now);
                (begin, part) = (begin + n, rest);
            }
        };
        #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
        // SAFETY: the kernel writes all of each piece, and the pieces make up the part.
        let y = unsafe { op::collect_chunks(x.len() / 2, CHUNK, fill) };
        Ok((y, shape.clone().into()))
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use candle_nn::VarMap;

    use super::*;

    fn largest(x: Tensor) -> Result<f32> {
        x.abs()?.flatten_all()?.max(0)?.to_scalar()
    }

    #[test]
    fn gated_pass_against_candle() -> Result<()> {
        for (rows, inner) in [(1, 1), (3, 5), (1, 9001), (7, 1500), (2, 4096), (0, 4)] {
            let x = Tensor::randn(0f32, 2.0, (rows, 2, 2 * inner), &Device::Cpu)?;
            let got = gated(&x, Activation::Silu)?;
            assert_eq!(got.dims(), [rows, 2, inner]);
            if rows > 0 {
                let want = (x.narrow(2, 0, inner)?.silu()? * x.narrow(2, inner, inner)?)?;
                // values up to 100, rounded three times
                assert!(largest((got - want)?)? < 3e-5);
            }
        }
        let half = gated(&Tensor::ones((2, 4), DType::BF16, &Device::Cpu)?, Activation::Relu)?;
        assert_eq!((half.dtype(), half.dims()), (DType::BF16, &[2, 2][..]));
        assert!(gated(&Tensor::ones(3, DType::F32, &Device::Cpu)?, Activation::Relu).is_err());
        Ok(())
    }

    #[test]
    fn loaded_under_the_names_given() -> Result<()> {
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
        let names = ["wi_0", "wi_1", "wo"];
        let mlp = GatedMlp::load([6, 10], Activation::GeluTanh, true, names, vb.pp("mlp"))?;
        let part = |name: &str, [input, out]: [usize; 2]| Linear::load(input, out, true, vb.pp("mlp").pp(name));
        let x = Tensor::randn(0f32, 1.0, (2, 3, 6), &Device::Cpu)?;
        let gate = part("wi_0", [6, 10])?.forward_act(&x, Activation::GeluTanh)?;
        let inner = (gate * part("wi_1", [6, 10])?.forward(&x)?)?;
        let want = part("wo", [10, 6])?.forward(&inner)?;
        // sums of ten products of size 1
        assert!(largest((mlp.forward(&x)? - &want)?)? < 1e-5);
        assert!(largest((mlp.forward_add(&x, &x)? - (want + &x)?)?)? < 1e-5);
        let plain = Mlp::load([6, 10], Activation::Relu, false, ["fc1", "fc2"], vb.pp("plain"))?;
        assert_eq!(plain.forward(&x)?.dims(), [2, 3, 6]);
        let misfit = GatedMlp::new(part("wi_0", [6, 10])?, Activation::Relu, part("wo", [10, 6])?).err().unwrap();
        assert!(misfit.to_string().contains("give 10 together, down takes 10"), "{misfit}");
        Ok(())
    }
}

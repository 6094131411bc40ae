//! The model families, one file each, and the parts that several of them share.

use candle_core::{D, Tensor};
use roofbench_core::cost::{self, Cost, PhaseCost};
use roofbench_core::session::{Phase, Result, Tensors};

pub mod blip;
pub mod blip_2;
pub mod clip;
pub(crate) mod distinct;
pub mod donut;
pub mod encoder_layer;
pub mod flava;
pub mod git;
pub mod imagebind;
pub mod instructblip;
pub mod language_model;
pub mod layoutlm;
pub mod layoutlmv3;
pub mod llava;
pub mod pix2struct;
pub mod qformer;
pub(crate) mod upstream;
pub mod videomae;
pub mod vilt;
pub mod vision_tower;

/// The outputs of a class by their names.
pub(crate) fn named<const N: usize>(outputs: [(&str, Tensor); N]) -> Tensors {
    outputs.into_iter().map(|(name, x)| (name.to_owned(), x)).collect()
}

/// A call of one phase.
pub(crate) fn forward_phase(cost: Cost) -> Vec<PhaseCost> {
    vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }]
}

/// The cost of a call in which `components` run before what `rest` is of.
pub(crate) fn behind<const N: usize>(components: [(Phase, Cost); N], rest: Vec<PhaseCost>) -> Vec<PhaseCost> {
    let component = |(phase, cost)| PhaseCost { phase, repeats: 1, cost };
    components.into_iter().map(component).chain(rest).collect()
}

/// Rows of length 1, as cosines are made of: (rows, width) → (rows, width). Mirrors `torch.nn.functional.normalize`.
pub(crate) fn unit_rows(x: &Tensor) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    roofbench_nn::cost::elementwise(rows, 3 * width + 1);
    x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(1e-12)?)
}

/// FLOPs of [`unit_rows`]: squares, their sum and a division an element, and a root a row.
pub(crate) fn unit_rows_cost(rows: u64, width: u64) -> Cost {
    cost::elementwise(rows, 3 * width + 1)
}

/// The products of every row of `a` with every row of `b`, times `scale`: (rows of a, rows of b).
pub(crate) fn products(a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let (width, scores) = (a.dim(1)?, a.dim(0)? * b.dim(0)?);
    roofbench_nn::cost::elementwise(scores, 2 * width + 1);
    a.matmul(&b.t()?)? * scale
}

/// FLOPs and bytes of [`products`]: a multiply-add for each element of a row, and the scale.
pub(crate) fn products_cost(rows: [u64; 2], width: u64, bytes: u64) -> Cost {
    let scores = rows[0] * rows[1];
    cost::elementwise(scores, 2 * width + 1) + Cost { activation_bytes: scores * bytes, ..Cost::default() }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn cosines_of_a_few_rows() -> Result<()> {
        let cpu = &Device::Cpu;
        let (a, b) = (Tensor::new(&[[3f32, 4.], [0., 0.]], cpu)?, Tensor::new(&[[0f32, 2.]], cpu)?);
        let (scores, recorded) = roofbench_nn::cost::record(|| products(&unit_rows(&a)?, &unit_rows(&b)?, 10.0));
        assert_eq!(scores?.to_vec2::<f32>()?, [[8.], [0.]]);
        let cost = unit_rows_cost(2, 2) + unit_rows_cost(1, 2) + products_cost([2, 1], 2, 4);
        assert_eq!((cost.flops, cost.activation_bytes), (2 * 7 + 7 + 2 * 5, 8));
        assert_eq!(recorded.flops, cost.flops);
        Ok(())
    }
}

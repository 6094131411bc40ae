//! How alike embeddings of texts, pictures or sounds are.

use candle_core::{D, DType, Tensor};

use crate::session::SessionError;
use crate::task::Answer;

/// Rows of `x` (n, width) at unit Euclidean length; a row of zeros stays.
///
/// # Errors
/// From candle.
pub fn normalize(x: &Tensor) -> candle_core::Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(1e-12)?;
    x.broadcast_div(&length)
}

/// Cosine of the angle between every two rows of `x` (n, width): (n, n), in [-1, 1].
///
/// # Errors
/// From candle.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_core::embeddings::cosine_similarities;
/// let x = Tensor::new(&[[3f32, 0.], [3., 4.]], &Device::Cpu)?;
/// assert_eq!(cosine_similarities(&x)?.to_vec2::<f32>()?, [[1., 0.6], [0.6, 1.]]);
/// # Ok::<_, candle_core::Error>(())
/// ```
pub fn cosine_similarities(x: &Tensor) -> candle_core::Result<Tensor> {
    let x = normalize(x)?;
    x.matmul(&x.t()?)
}

/// The cosine similarities between the `embeddings` of `names`, as a table.
///
/// # Shapes
/// `embeddings` is (names, width).
///
/// # Errors
/// Another shape.
pub fn table(names: &[String], embeddings: &Tensor) -> Result<Answer, SessionError> {
    let similarities = cosine_similarities(&embeddings.to_dtype(DType::F32)?)?.to_vec2::<f32>()?;
    let numbers: Vec<String> = (1..=names.len()).map(|n| n.to_string()).collect();
    let header = ["".to_owned(), "cosine similarity".to_owned()].into_iter().chain(numbers.iter().cloned()).collect();
    let rows = numbers.iter().zip(names).zip(similarities).map(|((number, name), row)| {
        let cells = row.iter().map(|similarity| format!("{similarity:.4}"));
        [number.clone(), name.clone()].into_iter().chain(cells).collect()
    });
    Ok(Answer::Table { header, rows: rows.collect() })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn nothing_divides_by_zero() -> Result<(), SessionError> {
        let zeros = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
        assert_eq!(normalize(&zeros)?.to_vec2::<f32>()?, [[0.; 3]; 2]);
        let Answer::Table { header, rows } = table(&["a".to_owned(), "b".to_owned()], &zeros)? else {
            panic!("a table")
        };
        assert_eq!((header.len(), rows.len(), rows[1].join(" ")), (4, 2, "2 b 0.0000 0.0000".to_owned()));
        Ok(())
    }
}

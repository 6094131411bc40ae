//! Pictures of a batch, each once: several questions about one picture need its states once.

use candle_core::{CpuStorage, Storage, Tensor};
use roofbench_core::session::Result;
use roofbench_nn::options;

/// The pictures of a batch without those that came before, where `shared-pictures` is on and they are f32 on the CPU;
/// elsewhere all of them.
pub(crate) struct Distinct {
    values: Tensor,
    /// Which of `values` stands in each place of the batch; none where all differ.
    places: Option<Tensor>,
}

impl Distinct {
    /// Of (batch, ...) pictures.
    pub(crate) fn of(values: &Tensor) -> Result<Self> {
        let all = Self { values: values.clone(), places: None };
        if !options::current().shared_pictures {
            return Ok(all);
        }
        let (firsts, places) = {
            let (storage, layout) = values.storage_and_layout();
            let (Storage::Cpu(CpuStorage::F32(data)), Some((start, end))) = (&*storage, layout.contiguous_offsets())
            else {
                return Ok(all);
            };
            let size = (end - start) / values.dim(0)?.max(1);
            let (mut firsts, mut places): (Vec<(u32, &[f32])>, Vec<u32>) = Default::default();
            for (item, picture) in (0u32..).zip(data[start..end].chunks_exact(size.max(1))) {
                let known = firsts.iter().position(|(_, first)| *first == picture);
                places.push(known.unwrap_or(firsts.len()) as u32);
                if known.is_none() {
                    firsts.push((item, picture));
                }
            }
            (firsts.into_iter().map(|(item, _)| item).collect::<Vec<_>>(), places)
        };
        if firsts.len() == places.len() {
            return Ok(all);
        }
        let rows = |items: &[u32]| Tensor::new(items, values.device());
        Ok(Self { values: values.index_select(&rows(&firsts)?, 0)?, places: Some(rows(&places)?) })
    }

    /// (pictures, ...), each once.
    pub(crate) fn values(&self) -> &Tensor {
        &self.values
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.values.dims()[0]
    }

    /// The states (pictures, ...) in the places of the batch.
    pub(crate) fn spread(&self, states: Tensor) -> Result<Tensor> {
        match &self.places {
            Some(places) => states.contiguous()?.index_select(&places.to_device(states.device())?, 0),
            None => Ok(states),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn pictures_that_stand_twice_are_kept_once() -> Result<()> {
        let values = Tensor::new(&[[[1f32], [2.]], [[3.], [4.]], [[1.], [2.]]], &Device::Cpu)?;
        let distinct = Distinct::of(&values)?;
        assert_eq!(distinct.count(), 2);
        assert_eq!(distinct.spread(distinct.values().clone())?.to_vec3::<f32>()?, values.to_vec3::<f32>()?);
        // a part of a larger tensor, another type, and the choice itself
        assert_eq!(Distinct::of(&values.narrow(0, 1, 2)?)?.count(), 2);
        assert_eq!(Distinct::of(&values.to_dtype(DType::F64)?)?.count(), 3);
        let mut apart = options::Options::default();
        apart.switch("shared-pictures", false);
        assert_eq!(options::with(apart, || Distinct::of(&values))?.count(), 3);
        Ok(())
    }
}

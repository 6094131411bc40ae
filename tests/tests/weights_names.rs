//! The tensors that a model reads at its published size: as many numbers as the checkpoint has parameters.

use roofbench_core::catalog;
use roofbench_tests::{families, synthetic};

/// Larger checkpoints have the same names in more layers, and would only take time and memory.
const LARGEST: u64 = 150_000_000;

#[test]
fn default_checkpoints_are_read_to_the_last_parameter() {
    for name in families() {
        let family = catalog::family(name).unwrap();
        for checkpoint in family.checkpoints.iter().filter(|checkpoint| checkpoint.parameters <= LARGEST) {
            let (_, weights) = synthetic(name, &checkpoint.class, &checkpoint.config).unwrap();
            let requested = weights.requested();
            let parameters = requested.iter().filter(|(tensor, shape)| !is_buffer(name, tensor, shape));
            let read: usize = parameters.map(|(_, shape)| shape.iter().product::<usize>()).sum();
            assert_eq!(read as u64, checkpoint.parameters, "{}", checkpoint.repository);
        }
    }
}

/// Tensors that the library does not count as parameters: statistics of batch norms, and in DETR the whole of them, which
/// are frozen there; EnCodec's codebooks; the statistics of spectra of SpeechT5's vocoder.
fn is_buffer(family: &str, tensor: &str, shape: &[usize]) -> bool {
    tensor.ends_with(".running_mean")
        || tensor.ends_with(".running_var")
        || (family == "encodec" && tensor.contains(".codebook."))
        || (family == "speecht5" && ["mean", "scale"].contains(&tensor))
        || (family == "detr" && tensor.contains(".backbone.") && shape.len() == 1)
}

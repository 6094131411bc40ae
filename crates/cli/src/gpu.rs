//! What a GPU's driver means by its errors, and the way out.
//!
//! candle passes the driver's words on; the codes in them (`CUDA_ERROR_…`, CUDA's driver API reference) are its own.

/// Codes, and what to do about them.
const CUDA: [(&[&str], &str); 8] = [
    (
        &["CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_INVALID_DEVICE"],
        "CUDA has no such GPU: see `nvidia-smi -L` and CUDA_VISIBLE_DEVICES; a container has to be given it (docker: \
         `--gpus all`)",
    ),
    (
        &["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"],
        "the GPU's memory is full: `nvidia-smi` shows who else uses it; a smaller --batch, or --dtype bf16, needs less",
    ),
    (
        &["CUDA_ERROR_DEVICE_UNAVAILABLE"],
        "the GPU is busy: another process holds it alone, or it takes none now (`nvidia-smi -q -d COMPUTE`)",
    ),
    (
        &[
            "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
            "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
            "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
            "CUDA_ERROR_STUB_LIBRARY",
        ],
        "the driver is older than the CUDA toolkit of this build, or not the kernel module's: update it (and restart), \
         or build with a toolkit no newer than the version that `nvidia-smi` names",
    ),
    (
        &["CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_INVALID_PTX"],
        "this build's kernels are for a newer GPU: build with CUDA_COMPUTE_CAP set to this one's compute capability, \
         which `roofbench probe` shows",
    ),
    (
        &["CUDA_ERROR_ECC_UNCORRECTABLE", "CUDA_ERROR_HARDWARE_STACK_ERROR", "CUDA_ERROR_CONTAINED"],
        "the GPU's memory or hardware is at fault: `nvidia-smi -q -d ECC` and `dmesg | grep -i xid` tell more",
    ),
    (
        &["CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_LAUNCH_TIMEOUT"],
        "a kernel failed or was stopped, which ends this process's use of the GPU: run the cell again, and look into \
         `dmesg | grep -i xid` where it happens again",
    ),
    (
        &["CUDA_ERROR_SYSTEM_NOT_READY", "CUDA_ERROR_NOT_INITIALIZED", "CUDA_ERROR_UNKNOWN"],
        "the driver does not come up or has lost the GPU: see whether `nvidia-smi` works and what `dmesg | grep -i xid` \
         says; on machines with NVSwitch the fabric manager has to run",
    ),
];

/// What to do about the error of a driver that `message` tells.
pub(crate) fn advice(message: &str) -> Option<&'static str> {
    let says = |code: &str| message.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|word| word == code);
    CUDA.iter().find(|(codes, _)| codes.iter().any(|code| says(code))).map(|(_, advice)| *advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As candle 0.11 with cudarc 0.19 words them.
    #[test]
    fn a_drivers_error_gets_its_way_out() {
        let told = |code: &str| advice(&format!("--device cuda:0: DriverError({code}, \"…\")")).unwrap_or_default();
        assert!(told("CUDA_ERROR_NO_DEVICE").contains("CUDA_VISIBLE_DEVICES"));
        assert!(told("CUDA_ERROR_OUT_OF_MEMORY").contains("--batch"));
        assert!(told("CUDA_ERROR_DEVICE_UNAVAILABLE").contains("busy"));
        assert!(told("CUDA_ERROR_UNSUPPORTED_PTX_VERSION").contains("older than the CUDA toolkit"));
        assert!(told("CUDA_ERROR_NO_BINARY_FOR_GPU").contains("CUDA_COMPUTE_CAP"));
        assert!(told("CUDA_ERROR_UNKNOWN").contains("lost"));
        assert_eq!((told("CUDA_ERROR_UNKNOWN_TO_US"), advice("out of memory")), ("", None));
    }

    #[test]
    fn an_error_on_its_way_to_the_reader_takes_it_along() {
        let error = anyhow::anyhow!("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")").context("loading");
        let told = crate::ui::chain(&error);
        assert!(told.starts_with("loading: ") && told.contains("--batch"), "{told}");
    }
}

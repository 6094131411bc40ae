//! Looks at a sensor from time to time while an interval runs.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// State that is brought up to date by looking at a sensor.
pub(super) trait Poll: Send + 'static {
    /// Time between looks.
    const PERIOD: Duration;
    fn poll(&mut self);
}

/// Polls at the start, every [`Poll::PERIOD`], and at the end.
pub(super) struct Poller<T> {
    state: Arc<Mutex<T>>,
    thread: Option<(Sender<()>, JoinHandle<()>)>,
}

impl<T: Poll> Poller<T> {
    pub(super) fn start(mut state: T) -> Self {
        state.poll();
        let state = Arc::new(Mutex::new(state));
        let (stop, stopped) = mpsc::channel();
        let shared = Arc::clone(&state);
        let body = move || {
            while stopped.recv_timeout(T::PERIOD) == Err(RecvTimeoutError::Timeout) {
                shared.lock().unwrap_or_else(PoisonError::into_inner).poll();
            }
        };
        let thread = thread::Builder::new().name("meter".into()).spawn(body);
        if let Err(error) = &thread {
            tracing::warn!("no thread for reading a meter ({error}): it is read at the ends of the interval only");
        }
        Self { state, thread: thread.ok().map(|handle| (stop, handle)) }
    }

    /// Polls a last time and hands the state to `read`.
    pub(super) fn finish<R>(self, read: impl FnOnce(&mut T) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.poll();
        let result = read(&mut state);
        drop(state);
        result
    }
}

impl<T> Drop for Poller<T> {
    fn drop(&mut self) {
        if let Some((stop, handle)) = self.thread.take() {
            drop(stop);
            // A panic in the thread was printed there; what it polled before stays valid.
            let _ = handle.join();
        }
    }
}

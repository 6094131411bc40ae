//! One process per cell: peak memory, thread pools and crashes of one cell are kept from the next.
//!
//! The worker is this program again. Its job goes to its standard input, its [`Message`]s come from its standard
//! output. `stop` on the input asks it to finish; when the input closes, whoever would read the result is gone, and it
//! ends at once. candle and rayon size their pools once per process from the environment, which is set here.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use roofbench_core::record::Record;

use crate::job::{Job, Message, STOP};

/// Lines of a worker's standard error that are kept for its record should it die.
const STDERR_TAIL: usize = 12;

/// What the planning process waits for.
enum Event {
    Message(Message),
    /// A line that is no message: a library wrote to standard output, or the worker to standard error.
    Noise(String),
    /// One of the worker's two outputs closed.
    Closed,
    /// Ctrl-C, or a request to terminate.
    Interrupt,
}

/// Runs workers one after another, and hears Ctrl-C.
pub(crate) struct Supervisor {
    sender: Sender<Event>,
    events: Receiver<Event>,
    interrupts: u32,
}

/// How a worker ended.
#[derive(Debug)]
pub(crate) enum End {
    /// It gave a record.
    Recorded(Box<Record>),
    /// It died, or took too long; why.
    Died(String),
    /// It was asked to stop and had nothing to record yet.
    Stopped,
}

impl Supervisor {
    /// Starts to listen for Ctrl-C, SIGTERM and SIGHUP.
    ///
    /// # Errors
    /// A handler is already there.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let (sender, events) = channel();
        let handler = sender.clone();
        // The receiver lives as long as the process measures; after that nobody has to hear it.
        ctrlc::set_handler(move || drop(handler.send(Event::Interrupt))).context("listening for Ctrl-C")?;
        Ok(Self { sender, events, interrupts: 0 })
    }

    /// Whether the user asked to stop.
    pub(crate) fn interrupted(&mut self) -> bool {
        while let Ok(event) = self.events.try_recv() {
            self.interrupts += u32::from(matches!(event, Event::Interrupt));
        }
        self.interrupts > 0
    }

    /// Measures `job` in its own process, for `limit` at most. `told` hears what it says meanwhile.
    ///
    /// # Errors
    /// The process can't be started.
    pub(crate) fn measure(
        &mut self,
        job: &Job,
        limit: Option<Duration>,
        mut told: impl FnMut(Told<'_>),
    ) -> anyhow::Result<End> {
        let mut worker = spawn(job)?;
        let mut input = worker.stdin.take().context("the worker has no standard input")?;
        self.listen(&mut worker)?;
        let mut line = serde_json::to_string(job).context("writing the job")?;
        line.push('\n');
        // A worker that dies at once closes its end; its exit says why.
        let _ = input.write_all(line.as_bytes()).and_then(|()| input.flush());

        let began = Instant::now();
        let mut tail: VecDeque<String> = VecDeque::new();
        let (mut record, mut open, mut expired) = (None, 2, false);
        while open > 0 {
            let event = match limit.filter(|_| !expired) {
                Some(limit) => self.events.recv_timeout(limit.saturating_sub(began.elapsed())),
                None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(Event::Message(Message::Record(given))) => record = Some(given),
                Ok(Event::Message(Message::Status(text))) => told(Told::Status(&text)),
                Ok(Event::Message(Message::Answer(text))) => told(Told::Answer(&text)),
                Ok(Event::Noise(text)) => {
                    told(Told::Noise(&text));
                    if tail.len() == STDERR_TAIL {
                        tail.pop_front();
                    }
                    tail.push_back(text);
                }
                Ok(Event::Closed) => open -= 1,
                Ok(Event::Interrupt) => {
                    self.interrupts += 1;
                    if self.interrupts == 1 {
                        told(Told::Noise("finishing the sample at hand; Ctrl-C again ends at once"));
                        let _ = writeln!(input, "{STOP}").and_then(|()| input.flush());
                    } else {
                        kill(&mut worker)?;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    expired = true;
                    kill(&mut worker)?;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = worker.wait().context("waiting for the worker")?;
        Ok(match record {
            Some(record) => End::Recorded(record),
            None if expired => {
                let seconds = limit.unwrap_or_default().as_secs_f64();
                End::Died(format!("took longer than its limit of {seconds} s (--timeout) and was ended"))
            }
            None if self.interrupts > 0 => End::Stopped,
            None => End::Died(death(status, tail.make_contiguous())),
        })
    }

    /// Forwards both outputs of `worker` as events.
    fn listen(&self, worker: &mut Child) -> anyhow::Result<()> {
        fn forward(output: impl Read + Send + 'static, sender: Sender<Event>, parse: bool) {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(output);
                let mut line = Vec::new();
                // Bytes, not text: what a crashing process writes need not be UTF-8.
                while let Ok(1..) = reader.read_until(b'\n', &mut line) {
                    let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                    let message = parse.then(|| serde_json::from_str(&text).ok()).flatten();
                    let _ = sender.send(message.map_or(Event::Noise(text), Event::Message));
                    line.clear();
                }
                let _ = sender.send(Event::Closed);
            });
        }
        forward(worker.stdout.take().context("the worker has no standard output")?, self.sender.clone(), true);
        forward(worker.stderr.take().context("the worker has no standard error")?, self.sender.clone(), false);
        Ok(())
    }
}

/// What a worker says while it measures.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Told<'a> {
    /// What it is doing now.
    Status(&'a str),
    /// A line for the reader.
    Answer(&'a str),
    /// A line of its log, or of what happens to it.
    Noise(&'a str),
}

fn spawn(job: &Job) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("finding this program's own file")?;
    let mut command = Command::new(&program);
    command.arg(crate::commands::WORKER).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for variable in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        command.env(variable, job.threads.to_string());
    }
    // Its own group: Ctrl-C at a terminal reaches the planning process alone, which then asks the worker to finish.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    #[cfg(windows)]
    {
        const CREATE_NEW_PROCESS_GROUP: u32 = 0x200;
        std::os::windows::process::CommandExt::creation_flags(&mut command, CREATE_NEW_PROCESS_GROUP);
    }
    command.spawn().with_context(|| format!("starting {} for {}", program.display(), job.label()))
}

/// Ends the worker now; one that has ended already is no error.
fn kill(worker: &mut Child) -> anyhow::Result<()> {
    worker.kill().context("ending the worker")
}

/// Why a worker without a record ended.
fn death(status: ExitStatus, tail: &[String]) -> String {
    #[cfg(unix)]
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    #[cfg(not(unix))]
    let signal: Option<i32> = None;
    const SIGKILL: i32 = 9;
    let how = match signal {
        Some(SIGKILL) => "was killed (signal 9), most likely because the system ran out of memory".to_owned(),
        Some(signal) => format!("crashed (signal {signal})"),
        None => format!("ended without a result ({status})"),
    };
    if tail.is_empty() { how } else { format!("{how}; its last words:\n{}", tail.join("\n")) }
}

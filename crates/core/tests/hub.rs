//! Downloads from a server that speaks the Hub's protocol, well or badly.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use roofbench_core::weights::{HubOptions, Source, Weights};
use safetensors::{Dtype, tensor::TensorView};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What is wrong with the server.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Each answer of weights ends after so many bytes of it.
    Breaks(usize),
    /// One byte of the weights is another.
    Damages,
    /// Every request is refused.
    Refuses(u16),
    /// Files are at another path of the server.
    Redirects,
    /// A few bytes at a time.
    Dawdles,
}

/// A request as it was: path and headers in lower case.
#[derive(Debug, Clone)]
struct Asked {
    path: String,
    headers: HashMap<String, String>,
}

struct Shared {
    files: BTreeMap<&'static str, Vec<u8>>,
    fault: Mutex<Fault>,
    asked: Mutex<Vec<Asked>>,
}

/// The server, which ends with the test's process.
struct Server {
    address: String,
    shared: Arc<Shared>,
    cache: TempDir,
}

impl Server {
    fn start(fault: Fault) -> Self {
        let numbers: Vec<u8> = (0..256u16).flat_map(|i| f32::from(i).to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F32, vec![16, 16], &numbers).unwrap();
        let weights = safetensors::serialize([("layer.weight", view)], None).unwrap();
        let files = BTreeMap::from([("config.json", b"{}".to_vec()), (WEIGHTS, weights)]);
        let shared = Arc::new(Shared { files, fault: Mutex::new(fault), asked: Mutex::default() });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let served = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&served);
                // a client that hangs up is no fault of the server's
                std::thread::spawn(move || drop(shared.serve(stream)));
            }
        });
        Self { address, shared, cache: tempfile::tempdir().unwrap() }
    }

    fn set(&self, fault: Fault) {
        *self.shared.fault.lock().unwrap() = fault;
    }

    fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// Opens the weights of the server's repository; their tensor's sum.
    fn open(&self) -> Result<f32, String> {
        let options = HubOptions {
            token: Some("hf_secret".to_owned()),
            endpoint: self.address.clone(),
            cache: self.cache.path().to_owned(),
            offline: false,
            progress: false,
        };
        let source = Source::Hub { repository: "owner/name".to_owned(), revision: None };
        let weights = Weights::open(&source, &[], "Model", &options).map_err(|error| error.to_string())?;
        let vb = weights.var_builder(candle_core::DType::F32, &candle_core::Device::Cpu);
        let tensor = vb.get((16, 16), "layer.weight").map_err(|error| error.to_string())?;
        tensor.sum_all().and_then(|sum| sum.to_scalar()).map_err(|error| error.to_string())
    }

    /// Where the answers of weights that were asked for began.
    fn ranges(&self) -> Vec<String> {
        let asked = self.asked().into_iter().filter(|asked| asked.path.ends_with(WEIGHTS));
        asked.map(|asked| asked.headers["range"].clone()).filter(|range| range != "bytes=0-0").collect()
    }
}

const SUM: f32 = 32640.0;

impl Shared {
    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut lines = (&mut reader).lines();
        let first = lines.next().unwrap_or(Ok(String::new()))?;
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut headers = HashMap::new();
        for line in lines {
            let line = line?;
            match line.split_once(": ") {
                Some((name, value)) => headers.insert(name.to_lowercase(), value.to_owned()),
                None => break,
            };
        }
        let range = headers.get("range").cloned();
        self.asked.lock().unwrap().push(Asked { path: path.clone(), headers });
        let fault = *self.fault.lock().unwrap();
        if let Fault::Refuses(status) = fault {
            return write!(&stream, "HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        if path == "/api/models/owner/name/revision/main" {
            let names: Vec<String> = self.files.keys().map(|name| format!("{{\"rfilename\": \"{name}\"}}")).collect();
            let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", names.join(", "));
            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close";
            return write!(&stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
        if let (Fault::Redirects, Some(rest)) = (fault, path.strip_prefix("/owner/name/resolve/main/")) {
            let head = "HTTP/1.1 307 Temporary Redirect\r\nContent-Length: 0\r\nConnection: close";
            return write!(&stream, "{head}\r\nLocation: /moved/{rest}\r\n\r\n");
        }
        self.send(stream, path.rsplit('/').next().unwrap_or_default(), &range.unwrap_or_default(), fault)
    }

    fn send(&self, mut stream: TcpStream, name: &str, range: &str, fault: Fault) -> std::io::Result<()> {
        let Some(file) = self.files.get(name) else {
            return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        };
        let hash = if name == WEIGHTS { format!("{:x}", Sha256::digest(file)) } else { "aa".repeat(20) };
        let (start, end) = range.strip_prefix("bytes=").and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
        let start: usize = start.parse().unwrap_or(0);
        let end = end.parse().map_or(file.len(), |end: usize| end + 1);
        let mut body = file[start.min(end)..end].to_vec();
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nETag: \"{hash}\"\r\nX-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\
             Content-Range: bytes {start}-{}/{}\r\nContent-Length: {}\r\n\r\n",
            end - 1,
            file.len(),
            body.len()
        )?;
        if body.len() > 1 && name == WEIGHTS {
            match fault {
                Fault::Breaks(after) => body.truncate(after),
                Fault::Damages => *body.last_mut().unwrap() ^= 1,
                Fault::Dawdles => {
                    for part in body.chunks(100) {
                        stream.write_all(part)?;
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    return Ok(());
                }
                _ => {}
            }
        }
        stream.write_all(&body)
    }
}

fn files_below(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(files_below(&entry.path()));
        } else {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found
}

#[test]
fn a_download_is_kept_and_not_asked_for_again() {
    let server = Server::start(Fault::None);
    assert_eq!(server.open(), Ok(SUM));
    let asked = server.asked();
    assert!(asked.iter().all(|asked| asked.headers["authorization"] == "Bearer hf_secret"), "{asked:?}");
    assert_eq!(server.open(), Ok(SUM));
    assert_eq!(server.asked().len(), asked.len());
}

#[test]
fn a_broken_connection_is_taken_up_where_it_broke() {
    let server = Server::start(Fault::Breaks(500));
    assert_eq!(server.open(), Ok(SUM), "1,100 bytes in three parts of 500");
    assert_eq!(server.ranges(), ["bytes=0-", "bytes=500-", "bytes=1000-"]);
}

#[test]
fn a_download_that_failed_goes_on_the_next_time() {
    let server = Server::start(Fault::Breaks(100));
    let error = server.open().unwrap_err();
    assert!(error.contains("owner/name@main") && error.contains("check the connection"), "{error}");
    server.set(Fault::None);
    assert_eq!(server.open(), Ok(SUM));
    assert_eq!(server.ranges().last().unwrap(), "bytes=500-", "five tries of 100 bytes are kept");
}

#[test]
fn what_arrives_damaged_is_not_kept() {
    let server = Server::start(Fault::Damages);
    let error = server.open().unwrap_err();
    assert!(error.contains("model.safetensors arrived damaged") && error.contains("SHA-256"), "{error}");
    assert!(!files_below(server.cache.path()).iter().any(|name| name == WEIGHTS));
    server.set(Fault::None);
    assert_eq!(server.open(), Ok(SUM));
}

#[test]
fn refusals_say_what_to_do() {
    for (status, words) in [
        (401, ["HF_TOKEN", "licence"]),
        (403, ["HF_TOKEN", "licence"]),
        (404, ["no such repository", "spelling"]),
        (429, ["too many requests", "wait"]),
        (503, ["503", "--offline"]),
    ] {
        let error = Server::start(Fault::Refuses(status)).open().unwrap_err();
        assert!(error.contains("owner/name@main"), "{error}");
        assert!(words.iter().all(|word| error.contains(word)), "{status}: {error}");
    }
}

#[test]
fn redirects_are_followed_and_a_slow_server_is_waited_for() {
    for fault in [Fault::Redirects, Fault::Dawdles] {
        let server = Server::start(fault);
        assert_eq!(server.open(), Ok(SUM), "{fault:?}");
    }
}

package dev.pagewire.example;

import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/**
 * A client of pagewire.v1 in Java: each part shows one habit of a gRPC client, and checks what it sees.
 *
 * <p>{@code java -jar target/pagewire-example.jar --address 127.0.0.1:50051 --prompt "Once upon a time"}
 *
 * <p>Exit codes: 0 everything was as it must be, 1 something was not, 2 wrong usage.
 */
public final class Main {
  private static final String USAGE = "flags: --address HOST:PORT, --prompt TEXT (not empty), "
      + "--overload N (offer so many streams at once, more than the server runs and queues; 0 offers none)";

  /** Returns one line about what it saw. */
  private interface Part {
    String run() throws Exception;
  }

  private Main() {}

  public static void main(String[] arguments) throws InterruptedException {
    Map<String, String> flags = flags(arguments);
    if (flags == null) {
      System.err.println(USAGE);
      System.exit(2);
      return;
    }
    ManagedChannel channel = connect(flags.get("--address"));
    int failed = runAll(new Parts(channel, flags.get("--prompt"), Integer.parseInt(flags.get("--overload"))));
    channel.shutdownNow();
    channel.awaitTermination(10, TimeUnit.SECONDS);
    System.exit(failed == 0 ? 0 : 1);
  }

  /** Null where they are wrong. */
  private static Map<String, String> flags(String[] arguments) {
    Map<String, String> flags = new LinkedHashMap<>();
    flags.put("--address", "127.0.0.1:50051");
    flags.put("--prompt", "The capital of France is");
    flags.put("--overload", "0");
    for (int i = 0; i < arguments.length; i += 2) {
      if (!flags.containsKey(arguments[i]) || i + 1 == arguments.length || arguments[i + 1].isEmpty()) {
        return null;
      }
      flags.put(arguments[i], arguments[i + 1]);
    }
    return flags.get("--overload").matches("\\d{1,6}") ? flags : null;
  }

  /** Connects with the first call. A ping tells a dead host from a silent one; the server allows one every 10 s. */
  private static ManagedChannel connect(String address) {
    return Grpc.newChannelBuilder(address, InsecureChannelCredentials.create())
        .keepAliveTime(30, TimeUnit.SECONDS)
        .keepAliveTimeout(10, TimeUnit.SECONDS)
        .build();
  }

  /** Prints a line for each part and a summary; returns how many failed. */
  private static int runAll(Parts parts) {
    Map<String, Part> all = new LinkedHashMap<>();
    all.put("stream", parts::stream);
    all.put("cancel", parts::cancel);
    all.put("cancel-by-id", parts::cancelById);
    all.put("deadline", parts::deadline);
    all.put("bad-request", parts::badRequest);
    all.put("same-id", parts::sameId);
    all.put("overload", parts::overload);
    Map<String, Integer> verdicts = new LinkedHashMap<>(Map.of("ok", 0, "skipped", 0, "FAILED", 0));
    all.forEach((name, part) -> {
      String verdict = "ok";
      String line;
      try {
        line = part.run();
      } catch (Parts.SkippedException skipped) {
        verdict = "skipped";
        line = skipped.getMessage();
      } catch (Exception error) {
        verdict = "FAILED";
        line = Refusal.of(error).toString(); // of what is no refusal too: UNKNOWN, and what it says
      }
      verdicts.merge(verdict, 1, Integer::sum);
      System.out.printf("%-12s %-7s  %s%n", name, verdict, line);
    });
    int failed = verdicts.get("FAILED");
    System.out.printf("%d ok, %d skipped, %d failed%n", verdicts.get("ok"), verdicts.get("skipped"), failed);
    return failed;
  }
}

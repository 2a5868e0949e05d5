package dev.pagewire.example;

import dev.pagewire.v1.CancelGenerationRequest;
import dev.pagewire.v1.FinishReason;
import dev.pagewire.v1.GenerateFinished;
import dev.pagewire.v1.GenerateRequest;
import dev.pagewire.v1.GenerateResponse;
import dev.pagewire.v1.InferenceServiceGrpc;
import dev.pagewire.v1.InferenceServiceGrpc.InferenceServiceBlockingStub;
import dev.pagewire.v1.SamplingParams;
import io.grpc.Channel;
import io.grpc.Context;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.MetadataUtils;
import io.grpc.stub.StreamObserver;
import java.util.Iterator;
import java.util.UUID;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.concurrent.atomic.AtomicReference;
import java.util.function.Supplier;

/**
 * What a client does, one part a habit. Each returns one line about what it saw, and throws where it saw something
 * else.
 */
final class Parts {
  /** A part that has not ended after so many seconds has failed. */
  private static final int LIMIT_SECONDS = 1200;

  /** Output that takes far longer than anything here waits for. */
  private static final int ENDLESS = 1000;

  private static final Metadata.Key<String> REQUEST_ID =
      Metadata.Key.of("request-id", Metadata.ASCII_STRING_MARSHALLER);

  private final Channel channel;
  private final String prompt;
  private final int overload;

  Parts(Channel channel, String prompt, int overload) {
    this.channel = channel;
    this.prompt = prompt;
    this.overload = overload;
  }

  /** A part that did not run, and how it would. */
  static final class SkippedException extends Exception {
    private static final long serialVersionUID = 1;

    SkippedException(String how) {
      super(how);
    }
  }

  /** A stream is deltas, and then its end with the usage. */
  String stream() {
    int tokens = 24;
    AtomicReference<Metadata> header = new AtomicReference<>();
    Iterator<GenerateResponse> call = listening(header).generate(request(tokens));
    StringBuilder text = new StringBuilder();
    int count = 0;
    int messages = 0;
    GenerateFinished end = GenerateFinished.getDefaultInstance();
    while (call.hasNext()) {
      GenerateResponse response = call.next();
      messages++;
      switch (response.getResponseCase()) {
        case DELTA -> {
          text.append(response.getDelta().getText());
          count += response.getDelta().getTokenIdsCount();
        }
        case FINISHED -> end = response.getFinished();
        case RESPONSE_NOT_SET -> throw new IllegalStateException("a message with nothing in it");
      }
    }
    if (end.getFinishReason() != FinishReason.FINISH_REASON_LENGTH || count != tokens) {
      throw new IllegalStateException(count + " tokens came of " + tokens + ", and the end " + end);
    }
    String shown = text.toString().replace("\n", "\\n");
    String id = header.get().get(REQUEST_ID);
    return "%d tokens in %d messages, request %s: \"%s\"".formatted(count, messages, id, shown);
  }

  /** Leaving a call tells the server, which frees everything the request held. */
  String cancel() {
    try (Context.CancellableContext context = Context.current().withCancellation()) {
      Iterator<GenerateResponse> call = within(context, () -> blocking().generate(request(ENDLESS)));
      for (int i = 0; i < 3; i++) {
        call.next();
      }
      context.cancel(null);
      return "left after 3 messages: " + expect(Status.Code.CANCELLED, drain(call)).code();
    }
  }

  /** Any client can end a request by its id, and its stream closes with CANCELLED. */
  String cancelById() {
    AtomicReference<Metadata> header = new AtomicReference<>();
    Iterator<GenerateResponse> call = listening(header).generate(request(ENDLESS));
    call.next();
    String id = header.get().get(REQUEST_ID);
    blocking().cancelGeneration(CancelGenerationRequest.newBuilder().setRequestId(id).build());
    return expect(Status.Code.CANCELLED, drain(call)).toString();
  }

  /** A deadline goes to the server with the call: it ends the request by itself, even if the client is gone. */
  String deadline() {
    int limit = 300;
    var stub = InferenceServiceGrpc.newBlockingStub(channel).withDeadlineAfter(limit, TimeUnit.MILLISECONDS);
    Refusal refusal = expect(Status.Code.DEADLINE_EXCEEDED, drain(stub.generate(request(ENDLESS))));
    return refusal.code() + " (limit " + limit + " ms)";
  }

  /** A request that is wrong in two fields is told both. */
  String badRequest() {
    GenerateRequest.Builder request = request(8).toBuilder();
    request.getSamplingBuilder().setTemperature(-1).setTopP(1.5f);
    Refusal refusal = expect(Status.Code.INVALID_ARGUMENT, drain(blocking().generate(request.build())));
    if (refusal.violations().size() != 2) {
      throw new IllegalStateException("not two violations: " + refusal.violations());
    }
    return refusal.toString();
  }

  /** A running request's id is taken; the reason is a word that a program can rely on. */
  String sameId() {
    GenerateRequest request = request(ENDLESS).toBuilder().setRequestId("java-" + UUID.randomUUID()).build();
    try (Context.CancellableContext context = Context.current().withCancellation()) {
      within(context, () -> blocking().generate(request)).next();
      Refusal refusal = expect(Status.Code.ALREADY_EXISTS, drain(blocking().generate(request)));
      if (!refusal.reason().equals("REQUEST_ID_IN_USE")) {
        throw new IllegalStateException("the reason is " + refusal.reason());
      }
      return refusal.toString();
    }
  }

  /** Whoever finds the queue full is told when to come back. The first refusal ends the other streams. */
  String overload() throws Exception {
    if (overload == 0) {
      throw new SkippedException("--overload N offers N streams at once");
    }
    BlockingQueue<Throwable> ends = new LinkedBlockingQueue<>();
    try (Context.CancellableContext context = Context.current().withCancellation()) {
      var stub = InferenceServiceGrpc.newStub(channel);
      for (int i = 0; i < overload; i++) {
        context.run(() -> stub.generate(request(ENDLESS), new Ends(ends)));
      }
      Throwable first = ends.poll(LIMIT_SECONDS, TimeUnit.SECONDS);
      if (first == null) {
        throw new TimeoutException("none of " + overload + " streams was refused within " + LIMIT_SECONDS + " s");
      }
      Refusal refusal = expect(Status.Code.RESOURCE_EXHAUSTED, first);
      if (refusal.retryAfter().isZero()) {
        throw new IllegalStateException("it was refused, and not told when to come back");
      }
      return refusal.toString();
    }
  }

  /** Hears of a stream's end alone. */
  private record Ends(BlockingQueue<Throwable> ends) implements StreamObserver<GenerateResponse> {
    @Override
    public void onNext(GenerateResponse response) {}

    @Override
    public void onError(Throwable error) {
      ends.add(error);
    }

    @Override
    public void onCompleted() {
      ends.add(Status.OK.asRuntimeException());
    }
  }

  /** A request for greedy tokens: past any end token, so that the stream is as long as it is meant to be. */
  private GenerateRequest request(int tokens) {
    SamplingParams sampling =
        SamplingParams.newBuilder().setTemperature(0).setMaxTokens(tokens).setIgnoreEos(true).build();
    return GenerateRequest.newBuilder().setText(prompt).setSampling(sampling).build();
  }

  private InferenceServiceBlockingStub blocking() {
    return InferenceServiceGrpc.newBlockingStub(channel).withDeadlineAfter(LIMIT_SECONDS, TimeUnit.SECONDS);
  }

  /** Keeps the initial metadata, which is there with the first message. */
  private InferenceServiceBlockingStub listening(AtomicReference<Metadata> header) {
    return blocking().withInterceptors(
        MetadataUtils.newCaptureMetadataInterceptor(header, new AtomicReference<>()));
  }

  /** A call that ends when the context is cancelled. */
  private static Iterator<GenerateResponse> within(
      Context context, Supplier<Iterator<GenerateResponse>> call) {
    Context outside = context.attach();
    try {
      return call.get();
    } finally {
      context.detach(outside);
    }
  }

  /** Reads a stream to its end, and returns what ended it. */
  private static Throwable drain(Iterator<GenerateResponse> call) {
    try {
      call.forEachRemaining(response -> {});
      return Status.OK.asRuntimeException();
    } catch (StatusRuntimeException error) {
      return error;
    }
  }

  /** Checks that a call ended with this code, and returns what came with it. */
  private static Refusal expect(Status.Code code, Throwable end) {
    Refusal refusal = Refusal.of(end);
    if (refusal.code() != code) {
      throw new IllegalStateException("it ended with " + refusal + " instead of " + code, end);
    }
    return refusal;
  }
}
